"""A criterion evaluated one example at a time: whatever its reduction, no example can rescale another's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from privet.batches.leaves import described
from privet.batches.structure import Arguments
from privet.batches.tree import paths_in, taken_apart
from privet.errors import ConfigurationError
from privet.gradients.capture.schedule import Schedule
from privet.training.memory import refuse_memory

__all__ = ["PrivateCriterion"]


class PrivateCriterion(nn.Module):
    """The sum or mean over the batch of `criterion` applied to each example alone.

    A token average with `ignore_index`, class weights with a mean, a root of a mean: all are split as the criterion
    itself would treat a batch of one. So one example's loss depends on that example alone.

    Args:
        criterion: a callable of tensors whose axis 0 is the batch; it returns the loss of a batch.
        reduction: how the examples' losses are put together.
        examples: returns the number of examples of the forward that is being trained on, or None if there is none.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        *,
        reduction: Literal["mean", "sum"],
        examples: Callable[[], int | None],
    ) -> None:
        super().__init__()
        if not callable(criterion):
            raise ConfigurationError(f"criterion must be callable, got {type(criterion).__name__}.")
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise ConfigurationError(
                "criterion has trainable parameters, whose gradients would not be clipped. Make it a part of the model."
            )
        self.criterion = criterion
        self.reduction = reduction
        self._examples = examples
        self._schedule = Schedule()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss of a batch, which falls apart into its examples."""
        losses = self.per_example(*args, **kwargs)
        if losses.shape[0] == 0:
            return losses.sum()
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def per_example(self, *args: Any, **kwargs: Any) -> Tensor:  # (B,)
        """Returns the loss of each example.

        Raises:
            ConfigurationError: if an argument's axis 0 is not the batch, the criterion refuses a batch of one, or it
                remembers earlier examples, which is looked at again on a public schedule of calls.
        """
        inputs = Arguments(args, kwargs)
        tensors, put = taken_apart(inputs, _has_examples, "the arguments")
        size = self._batch(tensors, inputs)
        if size == 0:
            return torch.stack([t.flatten().sum() for t in tensors if t.is_floating_point()]).sum().expand(0)

        def losses(of: Sequence[Tensor]) -> Tensor:
            return self._losses(of, put)

        if self._schedule.counts():
            refuse_memory(self, losses, [t.detach() for t in tensors])
        return losses(tensors)

    def _losses(self, tensors: Sequence[Tensor], put: Callable[[Sequence[Any]], Any]) -> Tensor:
        size = tensors[0].shape[0]

        def one(*rows: Tensor) -> Tensor:
            positional, keyword = put([row.unsqueeze(0) for row in rows])
            return self._scalar(self.criterion(*positional, **keyword))

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                return torch.vmap(one)(*tensors)
        except RuntimeError as error:
            if any(t.requires_grad for t in tensors) and size > 4096:
                raise
            try:  # an operation that cannot be mapped, such as one that looks at values: one example after the other
                return torch.stack([one(*(t[i] for t in tensors)) for i in range(size)])
            except RuntimeError:
                raise ConfigurationError(
                    f"criterion cannot be evaluated on one example: {error} Expected a criterion that accepts a batch "
                    "of size 1."
                ) from error

    def _batch(self, tensors: list[Any], inputs: Arguments) -> int:
        expected = self._examples()
        sizes = {t.shape[0] for t in tensors if isinstance(t, Tensor)}
        known = all(isinstance(t, Tensor) for t in tensors)
        if not known or len(sizes) != 1 or (expected is not None and sizes != {expected}):
            held = paths_in(inputs, "the arguments")
            found = ", ".join(f"{described(leaf)} in {path}" for path, leaf in held if _has_examples(leaf))
            raise ConfigurationError(
                f"criterion got {found or 'no tensor'} for a batch of {expected}. Expected tensors with the batch on "
                "axis 0 of each, so that the loss can be split into its examples. Do not merge the batch with other "
                "axes: for token losses pass logits as (B, V, T) and labels as (B, T). Make arrays and packed sequences"
                " tensors, and constants a part of the criterion."
            )
        return sizes.pop()

    @staticmethod
    def _scalar(loss: Tensor) -> Tensor:
        """Returns one example's loss: the sum of what a criterion without reduction gives."""
        return loss if loss.dim() == 0 else loss.sum()


def _has_examples(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray, PackedSequence)) and getattr(leaf, "ndim", 1) > 0
