"""Parameters that are gathered from their shards just before a module runs: the objects that stand in for them.

`fully_shard` keeps a shard of each parameter in the module, and puts a gathered parameter in its place while the module
runs. Operations meet the gathered one. It is one object for the whole run, of which only the memory comes and goes. So
it is looked for once its module is about to run, and then it is watched, and has a tripwire, like any other parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from privet.gradients.capture.capture import Capture
from privet.gradients.capture.hook import Hook, nothing
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.spread import Spread, is_part

__all__ = ["watch_stand_ins"]


class _Places:
    """Where in one module, and in those inside of it, the private parameters are.

    Args:
        module: gathers parameters before it runs.
        parameters: the private parameters by name, as they are while no module runs.
        capture: is told of each object that stands in for one.
        tripwires: are put on these objects too: a gradient arrives there before it is sent to other ranks.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], capture: Capture, tripwires: Tripwires
    ) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._own = dict(parameters)
        self._capture = capture
        self._tripwires = tripwires
        self._places = [
            (child, attribute, names[id(p)])
            for child in module.modules()
            for attribute, p in child._parameters.items()  # noqa: SLF001 - a tied parameter has several places
            if id(p) in names
        ]

    def look(self, module: nn.Module, args: Any) -> None:
        """Takes note of the objects that stand in for parameters now, and were not there before."""
        for child, attribute, name in self._places:
            found = child._parameters[attribute]  # noqa: SLF001
            known = self._own[name], self._capture.parameters[name], self._capture.roots.part(name)
            if found is None or any(found is each for each in known):
                continue
            if is_part(found):  # a tensor parallel plan goes on to hold it in parts
                self._capture.on_parts.meet(name, found)
            else:
                self._capture.meet(name, found)
            self._tripwires.add(name, found)


def watch_stand_ins(
    spread: Spread, parameters: Mapping[str, nn.Parameter], capture: Capture, tripwires: Tripwires
) -> list[RemovableHandle]:
    """Makes modules that gather parameters show the gathered ones to the capture; returns the handles of the hooks.

    Call it once the modules have the hooks with which they gather: those run first then. Where nothing is gathered,
    operations meet the parts that a tensor parallel plan has made, and the capture is told of these at once.
    """
    if not spread.gathering and spread.parts is not None:
        for name, p in parameters.items():
            if is_part(p):
                capture.on_parts.meet(name, p)
    return [
        module.register_forward_pre_hook(Hook(_Places(module, parameters, capture, tripwires).look, nothing))
        for module in spread.gathering
    ]
