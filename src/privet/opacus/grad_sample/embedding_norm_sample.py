"""Norms of an embedding's per-example gradients, at Opacus's path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from privet.opacus.grad_sample.samplers import compute_grad_sample

__all__ = ["compute_embedding_norm_sample"]


def compute_embedding_norm_sample(
    layer: nn.Embedding, activations: Sequence[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Returns the norm of each example's gradient, (B,), by parameter. Arguments as in `compute_grad_sample`."""
    rows = compute_grad_sample(layer, activations, backprops)
    return {p: found.flatten(1).norm(2, dim=1) for p, found in rows.items()}
