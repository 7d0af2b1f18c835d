"""Tensors computed from parameters alone (a slice, a transpose, a weight norm): parameters in all but name.

An operation on parameters and constants has no examples in it. Its result is kept as a `Derivation`, and per-example
gradients of it are pulled back to the parameters by its own autograd graph, which is linear in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privet.batches.out_of_memory import is_out_of_memory

__all__ = ["Derivation", "disjoint", "pull_back", "pull_back_rows", "pulled_back"]

_SMALL = 2**17
"""Entries of a derived tensor above which its rows go back one by one, on a CPU: so it was measured."""


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
    derivation: Derivation, parameters: Sequence[Tensor], gradient: Tensor
) -> list[Tensor]:  # derived shape -> each parameter's shape
    """Returns the gradient of each parameter for a gradient of the derived tensor."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        derivation.tensor, parameters, gradient.to(derivation.tensor.dtype), retain_graph=True, allow_unused=True
    )
    sums = [torch.zeros_like(p) if g is None else g.contiguous() for p, g in zip(parameters, found, strict=True)]
    held: set[int] = set()
    for index, value in enumerate(sums):  # `a + b` sends one tensor to both; noise is added in place, to each its own
        if value.untyped_storage().data_ptr() in held:
            sums[index] = value.clone()
        held.add(value.untyped_storage().data_ptr())
    return sums


def pull_back_rows(
    derivation: Derivation, parameters: Sequence[Tensor], rows: Tensor
) -> list[Tensor]:  # (R, *derived) -> (R, *shape) each
    """Returns the gradient of each parameter for each row's gradient of the derived tensor."""
    if rows.shape[0] == 0:
        return [rows.new_zeros(0, *p.shape) for p in parameters]
    blocks = list(pulled_back(derivation, parameters, rows))
    return blocks[0] if len(blocks) == 1 else [torch.cat(each) for each in zip(*blocks, strict=True)]


def pulled_back(
    derivation: Derivation, parameters: Sequence[Tensor], rows: Tensor
) -> Iterator[list[Tensor]]:  # (R, *derived) -> (R', *shape) each
    """Yields the gradients of the parameters for some rows after others, as many at once as is fastest.

    Rows that are small go back at once, as torch.vmap maps them over the way back. Where it cannot, and where the
    arithmetic of a row takes longer than the call, they go back one by one.
    """
    if rows.shape[0] > 1 and (rows.is_cuda or derivation.tensor.numel() <= _SMALL):
        found = None
        try:
            with warnings.catch_warnings():  # an operation without a batching rule is looped over, in torch itself
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                found = _all_at_once(derivation, parameters, rows)
        except Exception as error:  # if it is not vmap that fails, the first row says so
            if is_out_of_memory(error):
                raise
        if found is not None:
            yield found
            return
    for row in rows:
        yield [value.unsqueeze(0) for value in pull_back(derivation, parameters, row)]


def _all_at_once(derivation: Derivation, parameters: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        derivation.tensor,
        parameters,
        rows.to(derivation.tensor.dtype),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    none = [rows.new_zeros(len(rows), *p.shape) for p, g in zip(parameters, found, strict=True) if g is None]
    return [none.pop(0) if g is None else g for g in found]
