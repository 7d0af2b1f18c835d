"""A model with other numbers in its parameters for a while: moved a little, or in double precision.

The numbers are swapped and not written over: what was there is put back as the same memory, equal to the last bit, and
a graph that was built before keeps what it saved.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import is_graphs, with_tensors
from privet.batches.tree import mapped
from privet.errors import UnsupportedModelError
from privet.gradients.capture.state import floating_tensors
from privet.gradients.spread import is_part, put_into_parts

__all__ = ["in_double", "perturbed", "to_double"]

_RELATIVE = 1e-2
"""By how much of its size each number is moved."""
_FROM_ZERO = 0.1
"""Where to a tensor that is all zero is moved, such as a gate that is still closed."""
_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@contextmanager
def perturbed(module: nn.Module) -> Iterator[None]:
    """Moves the trainable parameters a little inside of this context, and puts them back after it.

    A branch behind a gate of zero has no effect, and no gradient. Moved away from zero it shows what it does.
    """
    put_into_parts(module)
    moving = [p for p in module.parameters() if p.requires_grad and not is_lazy(p)]
    whole: list[tuple[Tensor, Tensor]] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for place, p in enumerate(moving):
        held = p.detach().to_local() if is_part(p) else p.detach()  # type: ignore[attr-defined]
        (parts if is_part(p) else whole).append((held if is_part(p) else p, _moved(held, place)))
    try:
        with _swapped(whole), _overwritten(parts):
            yield
    finally:
        put_into_parts(module)  # what was gathered meanwhile is not what is held now


@contextmanager
def _overwritten(others: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Writes numbers over others in place, for memory that is gathered from where it is, and puts them back."""
    before = [(t, t.clone()) for t, _ in others]
    with torch.no_grad():
        try:
            for t, other in others:
                t.copy_(other)
            with torch.enable_grad():
                yield
        finally:
            for t, own in before:
                t.copy_(own)


@torch.no_grad()
def _moved(value: Tensor, place: int) -> Tensor:
    count = value.numel()
    if not (value.is_floating_point() or value.is_complex()) or count == 0 or value.layout != torch.strided:
        return value
    shift = _shifts(value.device, value.real.dtype)
    shift = shift.roll(place).repeat(-(-count // len(shift)))[:count].view(value.shape)
    typical = float(torch.linalg.vector_norm(value)) / count**0.5
    if typical == 0.0:
        return value + _FROM_ZERO * shift
    moved = torch.addcmul(value, value, shift.to(value.dtype), value=_RELATIVE)
    if int(value.count_nonzero()) < count:
        moved = torch.where(value == 0, (_RELATIVE * typical * shift).to(value.dtype), moved)
    return moved


@functools.cache
def _shifts(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns some thousand numbers of either sign and of size 0.5 to 1: never nearly nothing.

    Their number is a prime, so that no row of a matrix gets the same as the next. They are no secret.
    """
    drawn = torch.rand(8191, generator=torch.Generator().manual_seed(0)) - 0.5
    return (drawn + 0.5 * drawn.sign()).to(device, dtype)


@contextmanager
def in_double(module: nn.Module) -> Iterator[None]:
    """Has a module in double precision inside of this context, its plain tensors too, without autocast."""
    if any(map(is_part, module.parameters())):
        raise UnsupportedModelError("parameters that lie on several processes keep their type of number.")
    narrow = [t for t in floating_tensors(module) if t.dtype not in {torch.float64, torch.complex128}]
    with ExitStack() as contexts:
        for device in {t.device.type for t in narrow} | {"cpu"}:
            if device in {"cpu", "cuda"}:
                contexts.enter_context(torch.autocast(device, enabled=False))
        contexts.enter_context(_swapped([(t, _doubled(t.detach())) for t in narrow]))
        yield


def _doubled(t: Tensor) -> Tensor:
    return t.to(_WIDE.get(t.dtype, torch.float64))


def to_double(inputs: Any) -> Any:
    """Returns the inputs with floating-point tensors in double precision."""

    def double(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return _doubled(leaf) if leaf.is_floating_point() or leaf.is_complex() else leaf
        if isinstance(leaf, PackedSequence) and leaf.data.is_floating_point():
            return leaf.to(torch.float64)
        if is_graphs(leaf):
            return with_tensors(leaf, lambda t: double(t, path))
        return leaf

    return mapped(inputs, double, "the inputs")


@contextmanager
def _swapped(others: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    before = [(t, t.data) for t, _ in others]
    try:
        for t, other in others:
            t.data = other
        with warnings.catch_warnings():
            # Only speed suffers from it, and only here.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            yield
    finally:
        for t, data in before:
            t.data = data
