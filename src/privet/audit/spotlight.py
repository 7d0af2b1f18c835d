"""One row in the spotlight: how far a step goes along that row's own gradient, all other rows being silent.

The output of the first row of each physical batch keeps its value, and its gradient is made large; the outputs of the
other rows are constants. A training that clips right then moves by one unit of the clip norm along the row's gradient,
which is formed here a second time, by plain autograd on the row alone. More than one unit is a norm that was taken too
small, a row that was counted as several, or a use of a parameter that was added twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.cut import first_examples
from privet.batches.grow import detached
from privet.batches.tree import tensors_in

__all__ = ["Spotlight"]


class Spotlight:
    """Lights the first row of each physical batch.

    Args:
        model: the model that is trained. Its dropout layers are turned off, since the row is run a second time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rows: dict[int, tuple[Any, Tensor]] = {}  # by their content: a check may have run the same row before
        self._wanted: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all dropout layers
                module.p = 0.0

    def lit(self, output: Tensor, constant: Tensor, places: Tensor, inputs: Any, large: float) -> Tensor:
        """Returns the output with the first row made loud, if it is not a canary, and the others silent."""
        count = len(places)
        first = torch.arange(count, device=places.device).eq(0).logical_and(places < 0)
        loud = output + large * (output - output.detach())
        row = detached(first_examples(inputs, 1, examples=count, axis=0))
        if bool(first[0]):
            loud.register_hook(lambda gradient: self._on_gradient(row, gradient))  # type: ignore[no-untyped-call]
        shape = (-1,) + (1,) * (output.dim() - 1)
        return torch.where(first.view(shape), loud, constant.expand_as(output))

    def _on_gradient(self, row: Any, gradient: Tensor) -> None:
        key = hash(tuple(float(t.double().sum()) for t in tensors_in(row)))
        self._rows[key] = row, gradient[:1].detach().clone()

    def refer(self, parameters: Sequence[Tensor]) -> None:
        """Forms the gradients of the rows that were lit since the last step, at the weights of now."""
        training = {module: module.training for module in self._model.modules()}
        self._model.eval()
        total: list[Tensor] | None = None
        try:
            for (args, kwargs), cotangent in self._rows.values():
                found = self._gradient(args, kwargs, cotangent, parameters)
                size = torch.stack([g.double().square().sum() for g in found]).sum().sqrt()
                if not (size.isfinite() and size > 0.0):
                    continue
                units = [g.double() / size for g in found]
                total = units if total is None else [a + b for a, b in zip(total, units, strict=True)]
        finally:
            for module, flag in training.items():
                module.training = flag
            self._rows = {}
        self._wanted = [] if total is None else list(zip(parameters, total, strict=True))

    def _gradient(self, args: Any, kwargs: Any, cotangent: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            output = next(t for t in tensors_in(self._model(*args, **kwargs)) if t.requires_grad)
            chosen = [p for p in parameters if p.requires_grad]
            found = iter(torch.autograd.grad(output, chosen, cotangent, allow_unused=True))
        gradients = [next(found) if p.requires_grad else None for p in parameters]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]

    def length(self) -> tuple[float, float] | None:
        """Returns how far the step went along the sum of the lit rows' unit gradients, and that sum's squared length.

        The first number is over the second: one unit of the clip norm for each row gives the clip norm (over the
        divisor), whatever the angles between the rows. None if no row was lit, or the rows cancel.
        """
        wanted, self._wanted = self._wanted, []
        if not wanted or any(p.grad is None for p, _ in wanted):
            return None
        along = sum(float((p.grad.double() * unit).sum()) for p, unit in wanted if p.grad is not None)
        square = sum(float(unit.square().sum()) for _, unit in wanted)
        return (along / square, square) if square > 1e-6 else None
