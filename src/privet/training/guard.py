"""Only private gradients step: what another optimizer, or a line of the user's own, may not do with the others.

    what                                                                 what happens
    another optimizer steps on a released gradient, or on none           allowed: no data is asked again
    another optimizer steps on any other gradient of a private parameter refused, before it has moved anything
    a parameter changes while its ordinary gradient is shown             on the ledger as without privacy: ε = ∞

By default (`grad_sample_mode="auto"`) no gradient but a released one ever reaches `p.grad`. The modes that show
per-example gradients show the ordinary one too, from the backward to the step. A change by hand (`p -= lr * p.grad`)
passes no hook, so the values of all parameters are compared, bit by bit, when the gradient is not shown any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from privet.accounting.role import LedgerLike, begin_non_private
from privet.errors import ProtocolError

__all__ = ["Guard", "deviation_of"]

_TAG = "_privet_released"


class Guard:
    """Watches over the private parameters of one optimizer.

    Args:
        parameters: the private parameters by name.
        ledger: where a change without privacy is written.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ledger: LedgerLike) -> None:
        self._parameters = dict(parameters)
        self._ledger = ledger
        self._own: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._before: dict[str, Tensor] | None = None  # the parameters when their ordinary gradients were shown

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Guards the parameters from now on against every optimizer but this one."""
        self._own.add(optimizer)
        self.admit(self._parameters)
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_pre_hook(_before_any_step))

    def admit(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Guards these parameters from now on."""
        self._parameters.update(parameters)
        weakref.finalize(self, _drop_empty, [id(p) for p in parameters.values()])
        for p in parameters.values():
            _GUARDS.setdefault(id(p), weakref.WeakSet()).add(self)

    def detach(self) -> None:
        """Guards nothing any more, and drops the gradients that were released."""
        for p in self._parameters.values():
            _GUARDS.get(id(p), weakref.WeakSet()).discard(self)
            p.grad = None
        _drop_empty(id(p) for p in self._parameters.values())
        if not _GUARDS:
            while _HANDLES:
                _HANDLES.pop().remove()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is the one whose steps release."""
        return optimizer in self._own

    @staticmethod
    def release(parameter: nn.Parameter, gradient: Tensor, *, deviation: float | None = None) -> None:
        """Sets `p.grad` to a private gradient. Optimizers may step on it as often as they like.

        Args:
            parameter: the parameter.
            gradient: what was released of it.
            deviation: the standard deviation of the noise in each of its values; None if it is not the same each time.
        """
        # A mark on the object: a weak reference would forbid torch.utils.swap_tensors.
        setattr(gradient, _TAG, deviation)
        parameter.grad = gradient

    def shows(self) -> None:
        """Takes note that `p.grad` holds ordinary gradients from now on."""
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    def settle(self) -> bool:
        """Puts on the ledger that a parameter changed while ordinary gradients were shown, and returns whether one has.

        They count as shown until `hides` is called.
        """
        before = self._before
        if before is None or all(_same(before[name], p.detach()) for name, p in self._parameters.items()):
            return False
        begin_non_private(self._ledger, "a parameter changed while p.grad was not private")
        self._before = None
        return True

    def hides(self) -> None:
        """Takes note that no ordinary gradient is shown any more.

        Raises:
            ProtocolError: if a parameter changed while they were. That is on the ledger then.
        """
        changed = self.settle()
        self._before = None
        if changed:
            raise ProtocolError(
                "a private parameter changed between backward and step, while p.grad held the ordinary gradient: a "
                "step by hand or by an optimizer that calls no hook is without privacy. It is on the ledger, and "
                "epsilon is infinite from now on. Expected changes by the private optimizer's step alone; load weights "
                "before backward or after step. Begin again from weights of before, with a new engine and the ledger "
                "that was saved with them."
            )

    def refuse(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        """Raises if another optimizer is about to step on a gradient of a private parameter that was not released."""
        if self.owns(optimizer) or parameter.grad is None or hasattr(parameter.grad, _TAG):
            return
        names = [name for name, p in self._parameters.items() if p is parameter]
        if not names:  # the id of a parameter that is gone
            return
        raise ProtocolError(
            f"{type(optimizer).__name__} would step on a gradient of {names[0]}, which is private, and the gradient is "
            "not: it was never clipped, noised or billed. Expected the step of the optimizer that training was made "
            "private with. Call that one; for training without privacy use a copy of the model made before. Nothing "
            "was changed."
        )


def deviation_of(gradient: Tensor) -> float | None:
    """Returns the standard deviation of the independent noise in each value of a gradient, or None if it is not known.

    It is not known of a gradient that was not released, or of one whose noise depends on that of other steps.
    """
    found = getattr(gradient, _TAG, None)
    return found if isinstance(found, float) else None


_GUARDS: dict[int, weakref.WeakSet[Guard]] = {}
"""By the ids of the parameters, which each guard keeps alive. Networks that share a layer have a guard each."""
_HANDLES: list[Any] = []


def _drop_empty(ids: Iterable[int]) -> None:
    """Forgets parameters that no guard watches over any more."""
    for key in ids:
        if not _GUARDS.get(key, True):
            del _GUARDS[key]


def _before_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    """Asks the guards of all parameters before a step of any optimizer in this process."""
    if _GUARDS:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                guards = list(_GUARDS.get(id(parameter), ()))
                if not any(guard.owns(optimizer) for guard in guards):
                    for guard in guards:
                        guard.refuse(optimizer, parameter)


def _same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are the same to the bit. NaN is the same as itself."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
