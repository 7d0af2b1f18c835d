"""The criterion of ghost clipping: a loss for each example, whose backward brings the optimizer a clipped sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DPLossFastGradientClipping", "DPTensorFastGradientClipping"]


class DPTensorFastGradientClipping:
    """The losses of a batch, one for each example, that act like their mean or sum.

    Args:
        module: the private module.
        optimizer: gets the clipped sum of each backward.
        loss_per_sample: the losses, (B,).
        loss_reduction: `"mean"` or `"sum"`.
    """

    def __init__(self, module: Any, optimizer: Any, loss_per_sample: Tensor, loss_reduction: str = "mean") -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction = {loss_reduction}. Only 'sum' and 'mean' losses are supported.")
        self.module = module
        self.optimizer = optimizer
        self.loss_per_sample = loss_per_sample
        self.loss_reduction = loss_reduction

    def _reduced(self) -> Tensor:
        return self.loss_per_sample.mean() if self.loss_reduction == "mean" else self.loss_per_sample.sum()

    def item(self) -> float:
        """Returns the mean or sum as a number. It is not private."""
        return self.detach().item()

    def detach(self) -> Tensor:
        """Returns the mean or sum, detached. It is not private."""
        return self._reduced().detach()

    def backward(self) -> None:
        """Computes every example's norm and the clipped sum, which the optimizer's next step releases.

        Raises:
            ValueError: if there is not one loss for each example.
        """
        losses = self.loss_per_sample
        if losses.dim() > 1:
            if losses.numel() != len(losses):
                raise ValueError(
                    f"the criterion gave losses of shape {tuple(losses.shape)}. Expected one for each example: give "
                    "the shape of the outputs before they were flattened as criterion(..., shape=outputs.shape)."
                )
            losses = losses.view(-1)
        (losses.mean() if self.loss_reduction == "mean" else losses.sum()).backward()  # type: ignore[no-untyped-call]
        self.optimizer.receive(*self.module.take_clipped(self.optimizer.clipping_policy, self.optimizer.named))

    def _with(self, losses: Tensor) -> DPTensorFastGradientClipping:
        return DPTensorFastGradientClipping(self.module, self.optimizer, losses, self.loss_reduction)

    def _of(self, other: Any) -> Any:
        """Returns what is added to the losses; raises ValueError for losses of another reduction."""
        if not isinstance(other, DPTensorFastGradientClipping):
            return other
        if other.loss_reduction != self.loss_reduction:
            raise ValueError(
                f"a {self.loss_reduction} and a {other.loss_reduction} of losses cannot be added. Expected the same."
            )
        return other.loss_per_sample

    def __add__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample + self._of(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample - self._of(other))

    def __rsub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(other - self.loss_per_sample)

    def __mul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample / other)

    def __neg__(self) -> DPTensorFastGradientClipping:
        return self._with(-self.loss_per_sample)

    def __repr__(self) -> str:
        return f"DPTensorFastGradientClipping(loss_reduction={self.loss_reduction}, shape={self.loss_per_sample.shape})"

    def __str__(self) -> str:
        return f"DPTensorFastGradientClipping({self.item():.4f})"


class DPLossFastGradientClipping:
    """Evaluates a criterion for each example.

    Args:
        module: the private module.
        optimizer: gets the clipped sums.
        criterion: a loss with an attribute `reduction`, which is set to `"none"` while it runs.
        loss_reduction: `"mean"` or `"sum"`, the same as that of module, optimizer and criterion.
    """

    def __init__(self, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean") -> None:
        if not hasattr(criterion, "reduction"):
            criterion.reduction = module.loss_reduction
        reductions = {loss_reduction, criterion.reduction, module.loss_reduction, optimizer.loss_reduction}
        if len(reductions) > 1 or loss_reduction not in ("mean", "sum"):
            raise AssertionError(
                f"module, optimizer, criterion and loss_reduction have {sorted(map(str, reductions))}. Expected 'mean' "
                "or 'sum' for all of them."
            )
        self.module = module
        self.optimizer = optimizer
        self.criterion = criterion
        self.loss_reduction = loss_reduction
        own = {id(p) for p in optimizer.params}
        optimizer.name_parameters({n: p for n, p in module._module.named_parameters() if id(p) in own})  # noqa: SLF001 - Opacus's public name

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> DPTensorFastGradientClipping:
        """Returns the losses of a batch.

        Args:
            *args: of the criterion: outputs and targets.
            shape: of the outputs before they were flattened, (B, T, ...), where the loss is one of each token: an
                example is a sequence. Tokens that the criterion ignores do not count in its mean.
            **kwargs: of the criterion.
        """
        reduction, self.criterion.reduction = self.criterion.reduction, "none"
        try:
            losses = self.criterion(*args, **kwargs)
        finally:
            self.criterion.reduction = reduction
        if shape is not None and losses.shape[0] == shape[0] * shape[1]:
            losses = self._of_sequences(losses.view(shape[0], shape[1]), args, kwargs)
        return DPTensorFastGradientClipping(self.module, self.optimizer, losses, self.loss_reduction)

    def _of_sequences(self, losses: Tensor, args: Any, kwargs: Any) -> Tensor:  # (B, T) -> (B,)
        if self.loss_reduction == "sum":
            return losses.sum(1)
        targets = kwargs.get("target", args[1] if len(args) > 1 else None)
        ignored = getattr(self.criterion, "ignore_index", None)
        if targets is None or ignored is None:
            return losses.mean(1)
        counted = (torch.as_tensor(targets).view(losses.shape) != ignored).sum(1)
        found: Tensor = losses.sum(1) / counted.clamp(min=1)
        return found
