"""A criterion evaluated one example at a time: whatever its reduction, no example can rescale another's loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from privet.batches.leaves import described
from privet.batches.structure import Arguments
from privet.batches.tree import paths_in, taken_apart
from privet.errors import ConfigurationError
from privet.gradients.capture.loss_graph import graph_of
from privet.gradients.capture.loss_rules import is_weighted_mean
from privet.gradients.capture.schedule import Schedule
from privet.gradients.capture.undisturbed import undisturbed
from privet.training.memory import refuse_memory

__all__ = ["PrivateCriterion"]


class PrivateCriterion(nn.Module):
    """The sum or mean over the batch of `criterion` applied to each example alone.

    A token average with `ignore_index`, a root of a mean, a norm: all are split as the criterion itself would treat a
    batch of one. So one example's loss depends on that example alone. A mean weighted by class is refused: for a batch
    of one it divides the weight of the class by itself.

    Args:
        criterion: a callable of tensors whose axis 0 is the batch; it returns the loss of a batch.
        reduction: how the examples' losses are put together.
        examples: returns the number of examples of the forward that is being trained on, or None if there is none.
        on_losses: gets the losses of each batch.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        *,
        reduction: Literal["mean", "sum"],
        examples: Callable[[], int | None],
        on_losses: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        if not callable(criterion):
            raise ConfigurationError(f"criterion must be callable, got {type(criterion).__name__}.")
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise ConfigurationError(
                "criterion has trainable parameters, whose gradients would not be clipped. Make it a part of the model."
            )
        for part in criterion.modules() if isinstance(criterion, nn.Module) else ():
            weighted = isinstance(part, nn.CrossEntropyLoss | nn.NLLLoss) and part.weight is not None
            if weighted and part.reduction == "mean":
                raise _weights_without_effect()
        self.criterion = criterion
        self.reduction = reduction
        self._looked_at = False  # whether the criterion's own graph was, which a class does not show
        self._examples = examples
        self._on_losses = on_losses
        self._schedule = Schedule()

    def __iter__(self) -> NoReturn:
        raise ConfigurationError(
            "a criterion was iterated over, as if it were a loader. Expected the order module, optimizer, data_loader, "
            "criterion of what make_private returns. Swap the last two."
        )

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
        losses = self._evaluated(args, kwargs)
        if self._on_losses is not None:
            self._on_losses(losses)
        return losses

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        inputs = Arguments(args, kwargs)
        tensors, put = taken_apart(inputs, _has_examples, "the arguments")
        size = self._batch(tensors, inputs)
        if size == 0:
            return torch.stack([t.flatten().sum() for t in tensors if t.is_floating_point()]).sum().expand(0)

        def losses(of: Sequence[Tensor]) -> Tensor:
            return self._losses(of, put)

        if not self._looked_at:
            with undisturbed(self):
                looked_at = self._look_at([t[0] for t in tensors], put)
            self._looked_at = looked_at
        if self._schedule.counts():
            refuse_memory(self, losses, [t.detach() for t in tensors])
        return losses(tensors)

    def _losses(self, tensors: Sequence[Tensor], put: Callable[[Sequence[Any]], Any]) -> Tensor:
        size = tensors[0].shape[0]

        def one(*rows: Tensor) -> Tensor:
            return self._one(rows, put)

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

    def _one(self, rows: Sequence[Tensor], put: Callable[[Sequence[Any]], Any]) -> Tensor:
        """Returns the loss of one example."""
        positional, keyword = put([row.unsqueeze(0) for row in rows])
        return self._scalar(self.criterion(*positional, **keyword))

    def _look_at(self, rows: list[Tensor], put: Callable[[Sequence[Any]], Any]) -> bool:
        """Returns whether it could look; raises if the criterion is a mean weighted by class, however it is written."""
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in rows]
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is said where all examples are evaluated
            try:
                graph = graph_of(self._one(leaves, put), leaves)
            except RuntimeError:  # it cannot be evaluated on one example, and is told so where all of them are
                return False
        if graph is not None and any(map(is_weighted_mean, graph.operations)):
            raise _weights_without_effect()
        return True

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


def _weights_without_effect() -> ConfigurationError:
    return ConfigurationError(
        "criterion is a mean weighted by class (weight= with reduction='mean'), which divides by the weights of its "
        "labels. For one example alone that is the weight by itself, so that weights would have no effect; for a batch "
        "it lets one example's class rescale the others. Expected weights that are not divided out. Write "
        "reduction='sum': each example's loss is then weight[label] times its negative log-likelihood, and the batch's "
        "is their mean over its rows. The weights are public numbers: do not count them in the private data."
    )


def _has_examples(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray, PackedSequence)) and getattr(leaf, "ndim", 1) > 0
