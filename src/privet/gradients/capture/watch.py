"""All that watches one module's parameters, at either door: capture, tripwires, and hooks on parts of the module.

watch = Watch(module, parameters, within=module.forward)
watch.begin()                    # the hooks on parts of the module
names = watch.trains()           # before each forward: which parameters train now
watch.end()                      # the module is an ordinary one again
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn
from torch.utils.hooks import RemovableHandle

from privet.errors import ConfigurationError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.custom_modules import watch_custom_modules
from privet.gradients.capture.stand_ins import watch_stand_ins
from privet.gradients.capture.tripwire import Tripwires, thawed
from privet.gradients.spread import HERE, Spread

__all__ = ["Watch", "refuse_thawed"]


def refuse_thawed(found: Mapping[str, nn.Parameter]) -> NoReturn:
    """Raises for parameters that are trainable now, and were not when training became private."""
    raise ConfigurationError(
        f"{next(iter(found))} is trainable now and was frozen, or absent, when training became private: nothing would "
        "clip its gradients. Expected the same trainable parameters. Freeze it again, or make the module private anew."
    )


class Watch:
    """Watches the parameters of one module.

    Args:
        module: the user's module.
        parameters: its trainable parameters by canonical name.
        within: the function that every forward begins with.
        batch_first: whether the inputs have the batch on axis 0, else on axis 1.
        mapped: whether vmap takes the place of every rule.
        spread: the processes that hold the module together.
        admit: called with parameters, by name, that became trainable or were added since. It raises if they may not
            train from now on. Then nothing is changed. By default none may.
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
        admit: Callable[[Mapping[str, nn.Parameter]], None] | None = None,
    ) -> None:
        self.capture = Capture(parameters, batch_first=batch_first, mapped=mapped, within=within, parts=spread.parts)
        self.tripwires = Tripwires(parameters, self.capture.release)
        self._module = module
        self._own = dict(parameters)
        self._mapped = mapped
        self._spread = spread
        self._admit = admit or refuse_thawed
        self._handles: list[RemovableHandle] = []
        self._custom: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that are one operation

    def begin(self) -> None:
        """Puts hooks on modules that are one operation, and on those that gather parameters: after all of their own."""
        self._handles += [
            *self._watch_custom_modules(),
            *watch_stand_ins(self._spread, self._own, self.capture, self.tripwires),
        ]

    def _watch_custom_modules(self) -> list[RemovableHandle]:
        return [] if self._mapped else watch_custom_modules(self._module, self.capture, but=self._custom)

    def trains(self) -> frozenset[str]:
        """Returns the names of the parameters that are trainable now, and watches those that were not before.

        Raises:
            ConfigurationError, ProtocolError: if one that became trainable may not train from now on.
        """
        found = thawed(self._module, (*self._own.values(), *self.capture.roots.objects))
        if found:
            self._admit(found)
            for name, p in found.items():
                self._own[name] = p
                self.capture.roots.add(name, p)
                self.tripwires.add(name, p)
            self._handles += self._watch_custom_modules()
        return frozenset(name for name, p in self._own.items() if p.requires_grad)

    def end(self) -> None:
        """Takes all hooks away, and drops what was captured."""
        self.capture.release()
        self.tripwires.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
