"""What an auditor puts into a model and sees of a training: one coordinate for each canary, step by step.

The model gets one more parameter, `audit_canaries`, of one entry for each canary and some that belong to nobody. Where
a canary is among the rows, its output is replaced by a constant whose gradient goes to its own entry alone, and is
large: clipped as the training clips, one unit of the clip norm in a direction that nothing else uses. Whatever the
training adds, scales, drops or repeats then shows in `audit_canaries.grad`, which is read at each optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from privet.audit.canaries import CanaryBook
from privet.audit.spotlight import Spotlight
from privet.batches.tree import mapped
from privet.errors import ConfigurationError

__all__ = ["NAME", "Seen", "watched"]

NAME = "audit_canaries"
_LARGE = {torch.float16: 1e3, torch.bfloat16: 1e6}
_LARGEST = 1e8


@dataclass
class Seen:
    """What was seen of one run.

    Attributes:
        gradients: of each optimizer step, what it got for each entry, (E,) in float64.
        signs: of each step, the sign of the gradient of each canary that took part.
        lengths: of each step, how far it went along the gradients of the rows in the spotlight; see `Spotlight.length`.
        rows: how many rows of canaries were met in a backward.
    """

    gradients: list[Tensor] = field(default_factory=list)
    signs: list[dict[int, float]] = field(default_factory=list)
    lengths: list[tuple[float, float] | None] = field(default_factory=list)
    rows: int = 0


@contextmanager
def watched(model: nn.Module, book: CanaryBook, *, entries: int, spotlight: bool = False) -> Iterator[Seen]:
    """Watches a training of `model` inside of this context, and yields what is seen.

    Args:
        model: gets the parameter, and one hook; both are removed in the end.
        book: tells the canaries.
        entries: of the parameter, more than there are canaries: those beyond see noise only.
        spotlight: whether the other rows are silenced but for one, whose own gradient is looked at.
    """
    if NAME in dict(model.named_parameters()):
        raise ConfigurationError(f"the model has a parameter {NAME} already. Expected a model that is not audited yet.")
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ConfigurationError("the model has no parameters. Expected a model that is trained.")
    model.register_parameter(NAME, nn.Parameter(torch.zeros(entries, dtype=like.dtype, device=like.device)))
    auditor = _Auditor(book, getattr(model, NAME), Spotlight(model) if spotlight else None)
    handles = [
        model.register_forward_hook(auditor.on_output, with_kwargs=True),
        register_optimizer_step_pre_hook(auditor.before_step),
        register_optimizer_step_post_hook(auditor.after_step),
    ]
    try:
        yield auditor.seen
    finally:
        for handle in handles:
            handle.remove()
        delattr(model, NAME)


class _Auditor:
    def __init__(self, book: CanaryBook, parameter: Tensor, spotlight: Spotlight | None) -> None:
        self.seen = Seen()
        self._book = book
        self._spotlight = spotlight
        self._parameter = parameter  # of the module that ran last: a copy of the model has its own
        self._pending: dict[int, float] = {}
        self._constants: dict[tuple[int, ...], Tensor] = {}

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Puts the canaries' constants into the first output that needs a gradient."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        self._parameter = canaries = getattr(module, NAME)
        places = self._book.places((args, kwargs))
        if places is None:
            return None
        # Batches without canaries take the same way: which operations run may not depend on who is in the batch.
        done = False

        def put(leaf: Any, path: str) -> Any:
            nonlocal done
            fits = isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() and len(leaf) == len(places)
            if not fits:
                return leaf
            if done:
                return leaf if self._spotlight is None else leaf.detach()
            done = True
            constant = self._constant(leaf)
            large = _LARGE.get(leaf.dtype, _LARGEST)
            if self._spotlight is not None:
                leaf = self._spotlight.lit(leaf, constant, places, (args, kwargs), large)
            return self._put(leaf, constant, places, canaries, large)

        return mapped(output, put, "the output")

    def _put(self, output: Tensor, constant: Tensor, places: Tensor, canaries: Tensor, large: float) -> Tensor:
        own = F.embedding(places.clamp(min=0), canaries.unsqueeze(1)).squeeze(1)  # (B,)
        own.register_hook(lambda gradient: self._on_gradient(places, gradient))  # type: ignore[no-untyped-call]
        shape = (-1,) + (1,) * (output.dim() - 1)
        # The difference is 0 whatever the entry has become: the output of a canary never changes.
        carried = constant + (own - own.detach()).view(shape).to(output.dtype) * (large * constant)
        return torch.where((places >= 0).view(shape), carried.to(output.dtype), output)

    def _constant(self, output: Tensor) -> Tensor:
        """Returns the output of every canary: fixed numbers of both signs, so that a loss has a slope there."""
        key = tuple(output.shape[1:])
        if key not in self._constants:
            numbers = torch.randn(key, generator=torch.Generator().manual_seed(0))
            self._constants[key] = numbers / numbers.norm().clamp(min=1e-12)
        return self._constants[key].to(output)

    def _on_gradient(self, places: Tensor, gradient: Tensor) -> None:
        self.seen.rows += int((places >= 0).sum())
        for place, value in zip(places.tolist(), gradient.detach().sign().tolist(), strict=True):
            if place >= 0:
                self._pending[place] = value

    # -- at the optimizer's step -------------------------------------------------------------------------------------

    def _parameters(self, optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
        """Returns the parameters of an optimizer that trains the audited model, or None."""
        found = [p for group in optimizer.param_groups for p in group["params"]]
        return found if any(p is self._parameter for p in found) else None

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Forms the gradients of the rows in the spotlight, while the weights are those of the backward."""
        found = self._parameters(optimizer)
        if self._spotlight is not None and found is not None:
            self._spotlight.refer([p for p in found if p is not self._parameter])

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Reads what the optimizer got."""
        if self._parameters(optimizer) is None or self._parameter.grad is None:
            return
        self.seen.gradients.append(self._parameter.grad.detach().double().cpu().clone())
        self.seen.signs.append(self._pending)
        self._pending = {}
        self.seen.lengths.append(None if self._spotlight is None else self._spotlight.length())
