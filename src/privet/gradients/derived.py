"""Tensors computed from parameters alone (a slice, a transpose, a weight norm): parameters in all but name.

An operation on parameters and constants has no examples in it. Its result is kept as a `Derivation`, and per-example
gradients of it are pulled back to the parameters by its own autograd graph, which is linear in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privet.batches.out_of_memory import is_out_of_memory

__all__ = ["Derivation", "disjoint", "pull_back", "pull_back_rows"]


@dataclass(frozen=True, eq=False)
class Derivation:
    """A tensor derived from parameters, and where it came from."""

    label: str
    tensor: Tensor  # with its autograd graph
    sources: tuple[str, ...]  # the parameters it depends on
    isometric: bool  # a gradient keeps its norm on the way back
    part: tuple[int, int] | None = None  # (call, piece): pieces of one call hold different entries


def disjoint(derivations: Sequence[Derivation]) -> bool:
    """Returns whether the pulled-back gradients of these derivations never meet in one entry."""
    if len(derivations) == 1:
        return True
    if any(d.part is None for d in derivations):
        return False
    calls = {d.part[0] for d in derivations if d.part}
    return len(calls) == 1 and len({d.part for d in derivations}) == len(derivations)


def pull_back(
    derivation: Derivation, parameter: Tensor, gradient: Tensor
) -> Tensor:  # derived shape -> parameter shape
    """Returns the parameter's gradient for a gradient of the derived tensor."""
    result: Tensor | None = torch.autograd.grad(
        derivation.tensor, [parameter], gradient.to(derivation.tensor.dtype), retain_graph=True, allow_unused=True
    )[0]
    return torch.zeros_like(parameter) if result is None else result.contiguous()  # noise is added in place


def pull_back_rows(derivation: Derivation, parameter: Tensor, rows: Tensor) -> Tensor:  # (R, *derived) -> (R, *shape)
    """Returns the parameter's gradient for each row's gradient of the derived tensor.

    All rows go back at once, as torch.vmap maps them over the way back. Where it cannot, they go back one by one.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(0, *parameter.shape)
    if rows.shape[0] > 1:
        try:
            with warnings.catch_warnings():  # an operation without a batching rule is looped over, in torch itself
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                return _all_at_once(derivation, parameter, rows)
        except Exception as error:  # if it is not vmap that fails, the first row says so
            if is_out_of_memory(error):
                raise
    return torch.stack([pull_back(derivation, parameter, row) for row in rows])


def _all_at_once(derivation: Derivation, parameter: Tensor, rows: Tensor) -> Tensor:
    found: Tensor | None = torch.autograd.grad(
        derivation.tensor,
        [parameter],
        rows.to(derivation.tensor.dtype),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )[0]
    return rows.new_zeros(len(rows), *parameter.shape) if found is None else found
