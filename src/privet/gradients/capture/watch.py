"""All that watches one module's parameters, at either door: capture, tripwires, and hooks on parts of the module.

watch = Watch(module, parameters, within=module.forward)
watch.begin()                    # the hooks on parts of the module
names = watch.trains()           # before each forward: which parameters train now
watch.end()                      # the module is an ordinary one again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from privet.gradients.capture.capture import Capture
from privet.gradients.capture.custom_modules import watch_custom_modules
from privet.gradients.capture.stand_ins import watch_stand_ins
from privet.gradients.capture.tripwire import Tripwires, refuse_thawed
from privet.gradients.spread import HERE, Spread

__all__ = ["Watch"]


class Watch:
    """Watches the parameters of one module.

    Args:
        module: the user's module.
        parameters: its trainable parameters by canonical name.
        within: the function that every forward begins with.
        batch_first: whether the inputs have the batch on axis 0, else on axis 1.
        mapped: whether vmap takes the place of every rule.
        spread: the processes that hold the module together.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        within: Callable[..., Any],
        batch_first: bool = True,
        mapped: bool = False,
        spread: Spread = HERE,
    ) -> None:
        self.capture = Capture(parameters, batch_first=batch_first, mapped=mapped, within=within, parts=spread.parts)
        self.tripwires = Tripwires(parameters, self.capture.release)
        self._module = module
        self._own = dict(parameters)
        self._mapped = mapped
        self._spread = spread
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Puts hooks on modules that are one operation, and on those that gather parameters: after all of their own."""
        self._handles += [
            *([] if self._mapped else watch_custom_modules(self._module, self.capture)),
            *watch_stand_ins(self._spread, self._own, self.capture, self.tripwires),
        ]

    def trains(self) -> frozenset[str]:
        """Returns the names of the parameters that are trainable now.

        Raises:
            ConfigurationError: if any other parameter of the module is.
        """
        return refuse_thawed(self._module, self._own, self.capture.roots.objects)

    def end(self) -> None:
        """Takes all hooks away, and drops what was captured."""
        self.capture.release()
        self.tripwires.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
