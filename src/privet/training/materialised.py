"""Per-example gradients that users can see and change: `p.grad_sample`, `p.summed_grad` and `p.grad`.

As Appendix D of Yousefpour et al. (arXiv 2109.12298) prints them. Law 6, nothing non-private is kept, has its exception
here, in the modes that promise these attributes and in no other:

    moment                      p.grad_sample          p.summed_grad      p.grad
    after loss.backward()       (B, *p.shape)          None               the ordinary gradient, not private
    after optimizer.step()      (B, *p.shape)          the clipped sum    the private gradient
    after optimizer.zero_grad   None                   None               None
    after module.zero_grad      None                   None               None

Clipping happens at the step, of `p.grad_sample` as it then is. So a user may fill or change it: row i is then the
gradient of example i of the batch, and of no other; the guarantee is about rows.

Axes: B examples.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MethodType

import torch
from torch import Tensor, nn

from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.given import given
from privet.gradients.rows import wide
from privet.gradients.summation import clipped_sum, per_example_gradients
from privet.gradients.use import Recorded
from privet.gradients.weights import Policy
from privet.training.update import PrivateUpdate

__all__ = ["Materialised", "clear_with_zero_grad", "clipped_rows"]


def clipped_rows(
    rows: Mapping[str, Tensor],  # (B, *shape) each
    parameters: Mapping[str, nn.Parameter],
    policy: Policy,
) -> ClippedSum:
    """Returns the clipped sum of given per-example gradients, by the code and with the guarantees of `clipped_sum`."""
    examples = len(next(iter(rows.values())))
    uses = {name: [given(r.detach(), tuple(parameters[name].shape))] for name, r in rows.items()}
    return clipped_sum(Recorded(examples=examples, direct=uses), parameters, policy)


def clear_with_zero_grad(module: nn.Module, refuse: Callable[[], None]) -> Callable[[], None]:
    """Makes `module.zero_grad()` clear what this mode shows, and refuse what that of the optimizer refuses.

    Returns a function that makes it torch's own again.

    It is bound like a method. That of a copy clears the copy, whose gradients nobody waits for.

    Args:
        module: the private module.
        refuse: raises if a gradient would be lost.
    """
    original = weakref.ref(module)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's own signature
        if self is original():
            refuse()
        type(self).zero_grad(self, set_to_none)
        for p in self.parameters():
            if hasattr(p, "grad_sample"):
                p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]

    def undo() -> None:
        vars(module).pop("zero_grad", None)

    module.zero_grad = MethodType(zero_grad, module)  # type: ignore[method-assign]
    return undo


class Materialised:
    """Puts per-example gradients on the parameters after each backward, and clips what is there at each step.

    Args:
        update: of the private module. It asks for the sum when a step needs it.
    """

    def __init__(self, update: PrivateUpdate) -> None:
        self._update = update
        self._spent: dict[str, weakref.ref[Tensor]] = {}  # the rows that were clipped already
        self.clear()
        update.on_demand(self)
        update.on_forget(self.clear)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._update.parameters.items() if p.requires_grad}

    def _fresh(self, name: str, parameter: nn.Parameter) -> bool:
        rows = getattr(parameter, "grad_sample", None)
        spent = self._spent.get(name)
        return rows is not None and (spent is None or spent() is not rows)

    @property
    def pending(self) -> bool:
        """Returns whether some trainable parameter has rows that no step has clipped."""
        return any(self._fresh(name, p) for name, p in self._trainable().items())

    def clear(self) -> None:
        """Forgets all gradients; the attributes are there, and None."""
        self._drop()
        self._update.guard.hides()

    def _drop(self) -> None:
        try:
            for p in self._update.parameters.values():
                p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]
        except BaseException:  # an interrupt: rows on some parameters alone would be refused at each step from now on
            for p in self._update.parameters.values():
                p.grad_sample = p.summed_grad = None  # type: ignore[attr-defined]
            raise
        self._spent = {}

    def remove(self) -> None:
        """Takes the attributes away."""
        for p in self._update.parameters.values():
            for name in ("grad_sample", "summed_grad"):
                vars(p).pop(name, None)

    # -- after a backward --------------------------------------------------------------------------------------------

    def keep(self, recorded: Recorded, *, scale: float) -> None:
        """Puts the gradients of one backward on the parameters.

        Args:
            recorded: its uses, of the gradients of `sum_i loss_i / scale`.
            scale: what the loss was divided by: B for a mean.

        Raises:
            ProtocolError: if those of another backward still wait for their step.
        """
        if self.pending:
            raise ProtocolError(
                "a second backward came while p.grad_sample holds gradients that no step has taken. Expected one "
                "backward for each step. Call optimizer.step() first; or set p.grad_sample to None on every parameter "
                "to give that batch up."
            )
        self.clear()
        trainable = self._trainable()
        found = per_example_gradients(recorded, trainable, scale=scale)
        examples = recorded.examples or 0
        self._update.guard.shows()  # before the first of them is there, for an interrupt may come in between
        try:
            for name, p in trainable.items():
                shape = (examples, *p.shape)
                rows = found[name].view(shape) if name in found else torch.zeros(shape, dtype=p.dtype, device=p.device)
                p.grad_sample = rows  # type: ignore[attr-defined]
                p.grad = (rows.sum(0, dtype=wide(rows[:0]).dtype) / scale).to(p.dtype)
        except BaseException:  # an interrupt, or no memory: the batch is given up as a whole
            for p in trainable.values():
                p.grad = None
            self._drop()
            raise

    # -- at a step ---------------------------------------------------------------------------------------------------

    def bring(self) -> None:
        """Clips what `p.grad_sample` holds, if a step has not yet, and hands the sum to the update.

        Raises:
            ConfigurationError: if it is not `(B, *p.shape)` for one B; nothing was clipped then.
        """
        if not self.pending:
            return
        trainable = self._trainable()
        rows = self._rows(trainable)
        clipped = clipped_rows(rows, trainable, self._update.mechanism.clipping)
        for p in self._update.parameters.values():
            p.grad = None  # not private; of a parameter frozen since the backward, the optimizer would take it
        self._update.guard.hides()
        # First: rows that are refused, or whose step breaks off from here on, are given up, and never clipped twice.
        shown = {name: getattr(p, "grad_sample", None) for name, p in self._update.parameters.items()}
        self._spent = {name: weakref.ref(r) for name, r in shown.items() if isinstance(r, Tensor)}
        self._update.receive(clipped, examples=len(next(iter(rows.values()))))

    def _rows(self, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Returns every parameter's rows, all checked."""
        wrong, rows, sizes = [], {}, {}
        for name, p in trainable.items():
            value = getattr(p, "grad_sample", None)
            if not isinstance(value, Tensor):
                wrong.append(f"{name} has {type(value).__name__}")
            elif not self._fresh(name, p):
                wrong.append(f"{name} has the rows of the last step")
            elif value.dim() == 0 or value.shape[1:] != p.shape:
                wrong.append(f"{name} has shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}")
            elif not value.is_floating_point() or value.device != p.device or value.layout is not torch.strided:
                wrong.append(f"{name} has {value.dtype} ({value.layout}) on {value.device}")
            else:
                rows[name], sizes[name] = value, len(value)
        if len(set(sizes.values())) > 1:
            wrong.append("numbers of examples differ: " + ", ".join(f"{n} has {size}" for n, size in sizes.items()))
        if wrong:
            raise ConfigurationError(
                f"p.grad_sample does not hold one gradient for each example: {'; '.join(wrong)}. Expected dense "
                "floating point rows of shape (B, *p.shape) with one B, on every trainable parameter, zeros where it "
                "had no part. Nothing was released."
            )
        return rows

    def summed(self, clipped: ClippedSum) -> None:
        """Puts the clipped sum of a logical batch on the parameters, before noise is added."""
        for name, value in clipped.values.items():
            self._update.parameters[name].summed_grad = value.clone()  # type: ignore[attr-defined]
