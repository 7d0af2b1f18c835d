"""Attention at Opacus's names: torch's own layer, which the core knows, and the bias that Opacus puts in a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DPMultiheadAttention", "SequenceBias"]


class SequenceBias(nn.Module):
    """Appends one learned vector to the end of every sequence.

    Args:
        embed_dim: E, the size of the vector.
        batch_first: whether inputs are (B, T, E), else (T, B, E).
    """

    def __init__(self, embed_dim: int, batch_first: bool = False) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        super().__init__()
        self.batch_first = batch_first
        self.bias = nn.Parameter(torch.empty(embed_dim))
        nn.init.normal_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sequences, longer by one position."""
        batch, time = (0, 1) if self.batch_first else (1, 0)
        shape = [1, 1, x.shape[2]]
        shape[batch] = x.shape[batch]
        return torch.cat([x, self.bias.expand(shape)], dim=time)


class DPMultiheadAttention(nn.MultiheadAttention):
    """torch's `nn.MultiheadAttention`, trained by the core as it is: same arguments, same state, same results."""
