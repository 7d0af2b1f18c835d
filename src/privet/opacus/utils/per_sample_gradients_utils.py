"""Holds the per-example gradients of a module against those of its examples one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from privet.opacus.grad_sample import wrap_model
from privet.opacus.modules import clone_module, trainable_parameters
from privet.opacus.utils.packed_sequences import compute_seq_lengths

__all__ = [
    "ModelWithLoss",
    "check_per_sample_gradients_are_correct",
    "clone_module",
    "compute_grad_samples_microbatch_and_opacus",
    "compute_microbatch_grad_sample",
    "compute_microbatch_grad_sample_tensor_or_seq",
    "compute_opacus_grad_sample",
    "get_grad_sample_modes",
    "is_batch_empty",
    "unpack_packedsequences",
]


def is_batch_empty(batch: Any) -> bool:
    """Returns whether a batch, or the first tensor of one, has no entries."""
    tensor = batch if isinstance(batch, Tensor) else batch[0]
    return bool(tensor.numel() == 0)


class ModelWithLoss(nn.Module):
    """A module with an L1 loss against zeros behind it.

    Args:
        module: returns a tensor or a packed sequence.
        loss_reduction: `"mean"` or `"sum"`; the mean of packed sequences is that of the means of each.
    """

    supported_reductions = ("mean", "sum")

    def __init__(self, module: nn.Module, loss_reduction: str = "mean") -> None:
        super().__init__()
        if loss_reduction not in self.supported_reductions:
            raise ValueError(f"loss_reduction must be one of {self.supported_reductions}, got {loss_reduction!r}.")
        self.wrapped_module = module
        self.criterion = nn.L1Loss(reduction=loss_reduction)

    def forward(self, x: Any) -> Tensor:
        """Returns the loss of a batch."""
        output = self.wrapped_module(*x) if isinstance(x, tuple) and not isinstance(x, PackedSequence) else None
        output = self.wrapped_module(x) if output is None else output
        if not isinstance(output, PackedSequence):
            return self._loss(output)
        if self.criterion.reduction == "sum":
            return self._loss(output.data)
        return torch.stack([self._loss(each) for each in unpack_packedsequences(output)]).mean()

    def _loss(self, output: Tensor) -> Tensor:
        loss: Tensor = self.criterion(output, torch.zeros_like(output))
        return loss


@contextmanager
def _seeded() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def compute_microbatch_grad_sample(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
    loss_reduction: str = "mean",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Returns every parameter's gradients, of each example in a batch of its own, `(B, *shape)`.

    Args:
        x: the batch: a tensor, or a list of examples.
        module: any module.
        batch_first: whether the batch is on axis 0, else on axis 1.
        loss_reduction: `"mean"` or `"sum"`.
        chunk_method: returns the examples of a batch.
    """
    with _seeded():
        model = ModelWithLoss(clone_module(module), loss_reduction)
        if not batch_first and not isinstance(x, list):
            x = x.transpose(0, 1)
        found: dict[str, list[Tensor]] = {name: [] for name, _ in trainable_parameters(model.wrapped_module)}
        for example in chunk_method(x):
            model.zero_grad()
            model(example if isinstance(example, tuple) else example.unsqueeze(0 if batch_first else 1)).backward()
            for name, p in trainable_parameters(model.wrapped_module):
                found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
    return {name: torch.stack(rows) for name, rows in found.items()}


def compute_opacus_grad_sample(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
) -> dict[str, Tensor]:
    """Returns every parameter's per-example gradients, as a `GradSampleModule` has them."""
    with _seeded():
        wrapped = wrap_model(
            clone_module(module), grad_sample_mode, batch_first=batch_first, loss_reduction=loss_reduction
        )
        ModelWithLoss(wrapped, loss_reduction)(x).backward()
    return {name: p.grad_sample for name, p in trainable_parameters(wrapped._module)}  # type: ignore[attr-defined]  # noqa: SLF001 - Opacus's public name


def compute_microbatch_grad_sample_tensor_or_seq(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
    loss_reduction: str = "mean",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Returns what `compute_microbatch_grad_sample` does, of packed sequences too."""
    batch = unpack_packedsequences(x) if isinstance(x, PackedSequence) else x
    return compute_microbatch_grad_sample(batch, module, batch_first, loss_reduction, chunk_method)


def compute_grad_samples_microbatch_and_opacus(  # noqa: PLR0917 - Opacus's signature
    x: Any,
    module: nn.Module,
    batch_first: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
    chunk_method: Callable[[Any], Iterable[Any]] = iter,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the per-example gradients of examples one by one, and those of a `GradSampleModule`.

    Raises:
        RuntimeError: for an empty batch.
        ValueError: if the two are of different parameters.
    """
    if not isinstance(x, PackedSequence) and is_batch_empty(x):
        raise RuntimeError("the batch is empty: there is nothing to compare. Expected at least one example.")
    single = compute_microbatch_grad_sample_tensor_or_seq(x, module, batch_first, loss_reduction, chunk_method)
    batch = compute_opacus_grad_sample(x, module, batch_first, loss_reduction, grad_sample_mode)
    if single.keys() != batch.keys():
        raise ValueError(f"the parameters differ: {sorted(single.keys() ^ batch.keys())} are in one of the two alone.")
    return single, batch


def get_grad_sample_modes(use_ew: bool = False) -> list[str]:  # noqa: FBT001, FBT002 - Opacus's signature
    """Returns the names of the modes that show per-example gradients."""
    return ["hooks", "functorch", *(["ew"] if use_ew else [])]


def check_per_sample_gradients_are_correct(
    x: Any,
    module: nn.Module,
    *,
    batch_first: bool = True,
    atol: float = 10e-6,
    rtol: float = 10e-5,
    grad_sample_mode: str = "hooks",
) -> bool:
    """Returns whether a `GradSampleModule` of the module has the gradients of its examples one by one.

    Args:
        x: a batch.
        module: any module.
        batch_first: whether the batch is on axis 0, else on axis 1.
        atol: absolute tolerance.
        rtol: relative tolerance.
        grad_sample_mode: `"hooks"`, `"functorch"` or `"ew"`.
    """
    if grad_sample_mode == "ew" and not batch_first:
        raise RuntimeError("the mode 'ew' has the batch on axis 0.")
    for reduction in ("sum", "mean"):
        single, batch = compute_grad_samples_microbatch_and_opacus(x, module, batch_first, reduction, grad_sample_mode)
        for name, rows in batch.items():
            if rows.shape != single[name].shape or not torch.allclose(single[name], rows, atol=atol, rtol=rtol):
                return False
    return True


def unpack_packedsequences(X: PackedSequence) -> list[Tensor]:
    """Returns the sequences (T, ...) that are packed, the longest first."""
    padded, _ = pad_packed_sequence(X, batch_first=True)
    if X.sorted_indices is not None:
        padded = padded[X.sorted_indices]
    return [padded[row, :length] for row, length in enumerate(compute_seq_lengths(X.batch_sizes))]
