"""One logical step, from the secret sum to the optimizer: the part that both doors share.

Order matters, and is kept in one place: the ledger first, then noise, then `p.grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.accounting.event import Event
from privet.accounting.ledger import Ledger
from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.mechanism import Mechanism
from privet.noise import NoiseMechanism
from privet.sampling import BatchTicket

__all__ = ["PrivateUpdate", "refuse_optimizer"]

_REFUSED = {
    "LBFGS": "it evaluates the gradient many times in one step, and each evaluation is a release",
    "SparseAdam": "it reads sparse gradients, and noise makes every gradient dense",
}


def refuse_optimizer(optimizer: object) -> None:
    """Raises for optimizers that do not read one dense gradient a step."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise ConfigurationError(
                f"{kind.__name__} cannot train privately: {_REFUSED[kind.__name__]}. Use an optimizer that reads dense "
                "gradients once a step, such as SGD or AdamW."
            )


class PrivateUpdate:
    """Holds a clipped sum until the optimizer steps; then bills it, adds noise, and hands over `p.grad`.

    Args:
        parameters: the private parameters by name.
        mechanism: what is released at each step. It may be replaced between steps.
        noise: turns clipped sums into private gradients.
        ledger: where every step is written before its noise is drawn.
        divisor: a public constant: the expected batch size for a mean loss, 1 for a sum.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        mechanism: Mechanism,
        noise: NoiseMechanism,
        ledger: Ledger,
        divisor: float,
    ) -> None:
        self.parameters = dict(parameters)
        self.mechanism = mechanism
        self.noise = noise
        self.ledger = ledger
        self.divisor = divisor
        self.steps = 0
        self._pending: ClippedSum | None = None
        self._sampled = False
        self._ticket: BatchTicket | None = None
        self._billed: tuple[int, Mechanism | None] = (0, None)  # the last pass that was written, and under what
        self._warned = False
        self._stepping = False  # between the release and the end of the optimizer's step
        self._closure: Callable[[], Any] | None = None

    # -- where the batch came from -----------------------------------------------------------------------------------

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that the private loader is about to hand over."""
        self._ticket = ticket

    def _bill(self) -> Event | None:
        """Returns the event to be written for this step, or None if the pass that it is part of is written already."""
        if not self._sampled or self._ticket is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "a step was taken on a batch that did not come, whole and fresh, from the private loader. It is "
                    "billed as a Gaussian release without amplification by sampling. Train on the loader that "
                    "make_private returned, one step for each of its batches.",
                    stacklevel=2,
                )
            return self.mechanism.noise.event
        if self.mechanism.sampling.billed_per == "step":
            return self.mechanism.event(1)
        passes, mechanism = self._billed
        return None if passes == self._ticket.passes and mechanism == self.mechanism else self.mechanism.event(1)

    # -- the three moments of a step ---------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Returns whether a sum waits for its step."""
        return self._pending is not None

    def receive(self, clipped: ClippedSum, *, examples: int) -> None:
        """Takes the sum of one backward.

        Raises:
            ProtocolError: if the sum of another backward still waits.
        """
        if self._pending is not None:
            raise ProtocolError(
                "a second backward came before the optimizer's step. Expected one backward for each step: add the "
                "losses and call backward once, or use virtual steps to accumulate physical batches."
            )
        self._pending, self._stepping = clipped, False
        self._sampled = self._ticket is not None and self._ticket.size == examples

    def discard(self) -> None:
        """Forgets the sum that waits; nothing of it was released."""
        self._pending = None

    def release(self) -> None:
        """Bills the step, adds noise, and sets `p.grad` of every private parameter that is trainable now.

        Raises:
            ProtocolError: if there is no sum to release.
            BudgetExceededError: if the step would exceed the budget; then nothing was released, and the sum waits.
        """
        if self._pending is None:
            raise ProtocolError(
                "optimizer.step() without a private gradient: there was no backward since the last step. Expected "
                "forward, loss.backward(), then one optimizer.step(), with the model in train() mode."
            )
        event = self._bill()
        if event is not None:
            self.ledger.begin(event)
        if self._sampled and self._ticket is not None:
            self._billed = (self._ticket.passes, self.mechanism)
        clipped, self._pending, self._ticket, self._sampled = self._pending, None, None, False
        step, self.steps = self.steps, self.steps + 1
        private = self.noise.release(clipped, multiplier=self.mechanism.noise.multiplier, step=step)
        for name, value in private.values.items():
            parameter = self.parameters[name]
            if parameter.requires_grad:
                parameter.grad = self._divided(value).to(parameter.dtype).view_as(parameter)

    def _divided(self, value: Tensor) -> Tensor:
        return value if self.divisor == 1 else value.div_(self.divisor)

    # -- the optimizer's side ----------------------------------------------------------------------------------------

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Releases the pending sum; with a closure, releases what the closure brings. An optimizer's step pre-hook."""
        self._refuse_other_gradients(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # Where a subclass's step calls that of its base, torch runs the hooks of both: the inner ones find it all done.
        if closure is None:
            if self._pending is not None or not self._stepping:
                self.release()
                self._stepping = True
            return None
        if closure is self._closure:
            return None
        wrapped = self._closure = self._released_after(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Takes note that the gradient was used. An optimizer's step post-hook."""
        self._stepping, self._closure = False, None

    def _refuse_other_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        private = {id(p) for p in self.parameters.values()}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and id(p) not in private:
                raise ProtocolError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} with a gradient that nothing clipped: "
                    "it was frozen, or not there, when training became private. Expected the same parameters all "
                    "along. Make the whole model private anew, or give the parameter an optimizer of its own."
                )

    def _released_after(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ProtocolError("the optimizer called its closure twice in one step. Expected one gradient a step.")
            result = closure()
            self._refuse_other_gradients(optimizer)
            self.release()
            return result

        return wrapped

    def refuse_zero_grad(self) -> None:
        """Raises if a gradient would be thrown away between backward and step."""
        if self._pending is not None:
            raise ProtocolError(
                "zero_grad() between backward and step throws the gradient away, after it was computed from data. "
                "Expected zero_grad() before backward, or after step."
            )

    # -- to and from a checkpoint ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""
        return {"steps": self.steps, "noise": self.noise.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes; steps already taken here are never numbered again."""
        self.discard()
        self.noise.load_state_dict(state["noise"])
        self.steps = max(self.steps, int(state["steps"]))
        self._billed = (0, None)  # a pass that goes on after a resume is billed again
