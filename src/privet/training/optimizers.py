"""The optimizer's side of a private step: whose steps release, and optimizers whose steps cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from privet.errors import ConfigurationError, ProtocolError

__all__ = ["StepHooks", "refuse_optimizer"]

_REFUSED = {
    "LBFGS": "it evaluates the gradient many times in one step, and each evaluation is a release",
    "SparseAdam": "it reads sparse gradients, and noise makes every gradient dense",
}


def refuse_optimizer(optimizer: object) -> None:
    """Raises for optimizers that do not read one dense gradient a step."""
    if isinstance(optimizer, list | tuple):
        raise ConfigurationError(
            f"optimizer must be one torch.optim.Optimizer, got a {type(optimizer).__name__} of {len(optimizer)}. A "
            "step releases one gradient of all parameters. Several optimizers become one by "
            "privet.ChainedOptimizer(first, second); each of them may have a scheduler."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise ConfigurationError(
                f"{kind.__name__} cannot train privately: {_REFUSED[kind.__name__]}. Use an optimizer that reads dense "
                "gradients once a step, such as SGD or AdamW."
            )
    if type(optimizer).__module__.startswith("accelerate."):
        raise ConfigurationError(
            f"this {type(optimizer).__name__} was prepared by accelerate before, and is a wrapper whose step is not "
            "always one of the optimizer. Expected the optimizer that was given to accelerator.prepare. Give model, "
            "optimizer and loader to privet.integrations.accelerate.prepare, in place of accelerator.prepare."
        )


class StepHooks:
    """Makes every step of an optimizer a release, once, whatever calls it: with a closure, after the closure.

    Args:
        parameters: the private parameters by name.
        ready: returns whether a sum waits to be released.
        release: releases it, into `p.grad`.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, ready: Callable[[], bool], release: Callable[[], None]
    ) -> None:
        self._parameters = parameters
        self._ready = ready
        self._release = release
        self._stepping = False  # between the release and the end of the optimizer's step
        self._closure: Callable[[], Any] | None = None
        self._handles: list[RemovableHandle] = []
        self._says_scaling = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows the steps of the optimizer from now on."""
        if "_step_supports_amp_scaling" not in vars(optimizer):
            # A GradScaler then leaves its step to the optimizer, where it can be refused by name.
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # noqa: SLF001
            self._says_scaling = True
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the hooks away: the optimizer's steps are torch's own."""
        for handle in self._handles:
            handle.remove()
        if self._says_scaling:
            vars(optimizer).pop("_step_supports_amp_scaling", None)

    def renew(self) -> None:
        """Takes note that a new sum came: the next step releases it."""
        self._stepping = False

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Releases the pending sum; with a closure, releases what the closure brings. An optimizer's step pre-hook."""
        if getattr(optimizer, "found_inf", None) is not None or "grad_scaler" in kwargs:
            raise ProtocolError(
                "a GradScaler stepped a private optimizer. It multiplies the loss, so that every gradient would be "
                "clipped as if it were that much longer, and it skips steps by what it finds in the gradients. "
                "Expected a scaler that make_private knows: give it grad_scaler=. Or train in bfloat16 (autocast with "
                "dtype=torch.bfloat16), which needs none, or make it GradScaler(enabled=False)."
            )
        self._refuse_other_gradients(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # If the step of a subclass calls the step of its base, torch runs these hooks twice for one step. The second
        # time there is nothing left to release, and that is no mistake of the user's.
        if closure is None:
            self._release_once()
            return None
        if closure is self._closure:  # wrapped by the hook of the outer step
            return None
        wrapped = self._closure = self._released_after(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def release_early(self, optimizer: torch.optim.Optimizer) -> None:
        """Releases the pending sum now, before the optimizer's step, which then releases nothing."""
        self._refuse_other_gradients(optimizer)
        self._release_once()

    def _release_once(self) -> None:
        if self._ready() or not self._stepping:
            self._release()
            self._stepping = True

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Forgets the step that has ended: the next one needs a new sum. An optimizer's step post-hook."""
        self._stepping, self._closure = False, None

    def _refuse_other_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if the step would use a gradient that nothing clipped, of a parameter that is not private."""
        private = {id(p) for p in self._parameters.values()}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and id(p) not in private:
                raise ProtocolError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} with a gradient that nothing clipped: "
                    "it was frozen, or not there, when training became private. Expected the same parameters all "
                    "along. To train it, build a new module, load_state_dict() what this one learned, and make that "
                    "private; or give the parameter an optimizer of its own."
                )

    def _released_after(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """Returns a closure that releases what the user's closure brings, between its backward and the update."""
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ProtocolError("the optimizer called its closure twice in one step. Expected one gradient a step.")
            result = closure()
            self._refuse_other_gradients(optimizer)
            self._release()
            return result

        return wrapped
