"""Convolutions in one, two and three dimensions, and their transposes.

Axes as in `patches.py`. One example's gradient is a sum over the places of the output; a weight used several times has
the sum of the uses as its gradient, which is formed before any norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.precision import product_errors
from privet.gradients.rows import factor_norms, of_type, padded, row_norms, summed, weighted_rows, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.convolution_strategy import ConvolutionStrategy, convolution_strategy
from privet.gradients.rules.gram import never_too_small
from privet.gradients.rules.patches import Pairing
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import ROWS_BYTES, row_chunks
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["Convolution", "Geometry"]

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Geometry:
    """The constants of a convolution, one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None  # None where the convolution is not a transposed one

    @property
    def transposed(self) -> bool:
        """Returns whether the convolution is a transposed one."""
        return self.output_padding is not None

    def arguments(self) -> tuple[Any, ...]:
        """Returns the constants in the order of `torch.convolution`."""
        extra = self.output_padding or (0,) * len(self.stride)
        return (self.stride, self.padding, self.dilation, self.transposed, extra, self.groups)


def _geometry(use: Use) -> Geometry:
    assert isinstance(use.operation, Convolution)
    return use.operation.geometry


def _pairing(use: Use) -> Pairing:
    (data,) = use.data
    assert data is not None
    geometry = _geometry(use)
    pair = (wide(use.gradient), wide(data)) if geometry.transposed else (wide(data), wide(use.gradient))
    kernel = use.shape[2:]
    return Pairing(*pair, kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


class _Weight(Rule):
    """The kernel: `sum_t field_t patch_t^T` for each row."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([_pairing(use).instantiated() for use in uses])

    def squared_norms(self, uses: Uses) -> Tensor:
        if len(uses) > 1:
            size = uses.rows * uses[0].gradient.element_size()
            for n in uses.shape:
                size *= n
            fits = size <= min(ROWS_BYTES, uses.allowance.left)
            strategy = ConvolutionStrategy.ROWS if fits else ConvolutionStrategy.TILES
        else:
            strategy = convolution_strategy(_pairing(uses[0]), budget=min(ROWS_BYTES, uses.allowance.left))
        return self.norms_by(strategy, uses)

    def norms_by(self, strategy: ConvolutionStrategy, uses: Uses) -> Tensor:  # (R,)
        """Returns the squared norms, found in a given way."""
        match strategy:
            case ConvolutionStrategy.ROWS:
                return row_norms(uses.remembered(lambda: self.per_example(uses)))
            case ConvolutionStrategy.PIXELS if len(uses) == 1:
                return _gram_norms(_pairing(uses[0]), again=lambda rows: self._tile_norms(uses.selected(rows)))
            case _:
                return self._tile_norms(uses)

    def _tile_norms(self, uses: Uses) -> Tensor:
        chunks = row_chunks(uses.rows, uses[0].gradient.element_size() * _entries(uses.shape))
        norms = [row_norms(self.per_example(uses.narrowed(c.start, c.stop))) for c in chunks]
        if not norms:
            return row_norms(self.per_example(uses))
        # The weighted sum will be an ordinary weight gradient, and not of these rows.
        return padded(torch.cat(norms), self.rounding(uses))

    def rounding(self, uses: Uses) -> Tensor:
        """Returns a share of `|patches| |field|`, no less than `sum_t |patch_t| |field_t|`.

        A pixel is in at most as many patches as the kernel has places.
        """
        pairings = [_pairing(use) for use in uses]
        patches = summed([factor_norms(p.source) * math.prod(p.kernel) for p in pairings])
        field = summed([factor_norms(p.field) for p in pairings])
        # Its own places: how far other rows are filled up with zeros must not matter.
        places = summed([(p.field != 0.0).any(1).flatten(1).sum(1, dtype=field.dtype) for p in pairings])
        return patches.sqrt() * field.sqrt() * product_errors(places, field.device, kind="convolution")

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        if uses.rows_memo is not None:
            return weighted_rows(uses.rows_memo, weights)
        return summed([_weighted(use, weights) for use in uses])


def _entries(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _weighted(use: Use, weights: Tensor) -> Tensor:  # (R,) -> shape
    """Returns the weighted sum of the rows by one ordinary weight-gradient call."""
    (data,) = use.data
    assert data is not None
    data, gradient = wide(data), wide(use.gradient)
    if not gradient.numel() or not data.numel():
        return gradient.new_zeros(use.shape)
    gradient = gradient * of_type(weights, gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
    weight = gradient.new_empty(use.shape)  # only its shape is read
    arguments = _geometry(use).arguments()
    return _backward(gradient, data, weight, None, *arguments, (False, True, False))[1]  # type: ignore[no-any-return]


def _gram_norms(pairing: Pairing, *, again: Callable[[Tensor], Tensor]) -> Tensor:  # (R,)
    """Returns `sum_ts (patch_t . patch_s)(field_t . field_s)` plus a bound on its error.

    `again` finds the norms whose bound is not narrow, from the indices of their rows; see `never_too_small`.
    """
    patches, field = pairing.grams()
    left, right = (m.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for m in (patches, field))
    gram = field.mul_(patches).flatten(1).sum(1)
    entries = (pairing.depth, pairing.field.shape[1])
    terms = max(pairing.source.shape[1] * max(pairing.kernel), entries[1])
    return never_too_small(gram, (left, right), entries, terms=terms, kind="convolution", again=again)


class _Bias(Rule):
    """A vector added at every place: the sum of the gradient over the places."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([g.sum(tuple(range(2, g.dim()))) for g in (wide(use.gradient) for use in uses)])


class Convolution(Operation):
    """A convolution or transposed convolution; rows on axis 0."""

    bilinear = True
    rules: Mapping[str, Rule] = {"weight": _Weight(), "bias": _Bias()}

    def __init__(self, function: Callable[..., Tensor], geometry: Geometry) -> None:
        self.function = function
        self.geometry = geometry

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the convolution's output."""
        g = self.geometry
        arguments = (data[0], values["weight"], values.get("bias"), g.stride, g.padding)
        if g.transposed:
            return self.function(*arguments, g.output_padding, g.groups, g.dilation)
        return self.function(*arguments, g.dilation, g.groups)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the input's gradient; no weight gradient is computed."""
        (x,) = data
        same = gradient.dtype
        result = _backward(
            gradient,
            of_type(x, same),
            of_type(values["weight"], same),
            None,
            *self.geometry.arguments(),
            (True, False, False),
        )
        return [of_type(result[0], x.dtype)]


_DIMENSIONS = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3,
    torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3,
}  # fmt: skip


def _numbers(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    numbers = tuple(int(v) for v in value)
    return numbers * dimensions if len(numbers) == 1 else numbers


@handles(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1)
    if a is None:
        return NotImplemented
    n = _DIMENSIONS[func]
    steps, hops = _numbers(a.stride, n), _numbers(a.dilation, n)
    padded, sides = a.input, (0,) * n
    if a.padding == "same":
        if any(s != 1 for s in steps):
            names = _names(call, a.weight, a.bias)
            raise UnsupportedModelError(f"{names}: padding='same' with stride {a.stride}. Expected stride 1.")
        totals = [d * (k - 1) for d, k in zip(hops, a.weight.shape[2:], strict=True)]
        sides = tuple(t // 2 for t in totals)
        if any(t % 2 for t in totals):  # torch adds the odd one at the end
            padded = F.pad(padded, [e for t in reversed(totals) for e in (0, t % 2)])
    elif a.padding != "valid":
        sides = _numbers(a.padding, n)
    return _applied(call, func, a, padded, Geometry(steps, sides, hops, a.groups))


@handles(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _transposed(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(
        args, kwargs, input=None, weight=None, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    )
    if a is None:
        return NotImplemented
    steps, sides, extra, hops = (
        _numbers(v, _DIMENSIONS[func]) for v in (a.stride, a.padding, a.output_padding, a.dilation)
    )
    return _applied(call, func, a, a.input, Geometry(steps, sides, hops, a.groups, extra))


def _names(call: Call, *roots: Any) -> str:
    return ", ".join(call.label(root) for root in roots if call.is_root(root))


def _applied(call: Call, func: Any, a: SimpleNamespace, padded: Tensor, geometry: Geometry) -> Any:
    """Returns the captured convolution of the input, padded before if need be; NotImplemented if it is not one."""
    constants = [t for t in (a.weight, a.bias) if t is not None and not call.is_root(t)]
    if call.is_root(a.input) or any(t.requires_grad for t in constants):
        return NotImplemented
    if a.input.dim() != _DIMENSIONS[func] + 2:
        raise UnsupportedModelError(
            f"{_names(call, a.weight, a.bias)}: {func.__name__} met an input of shape {tuple(a.input.shape)}. Expected "
            f"{_DIMENSIONS[func] + 2} axes, the batch first. Add a batch axis, of size 1 if need be."
        )
    roots = {"weight": a.weight, "bias": a.bias}
    return call.apply(Convolution(func, geometry), (padded,), roots, layout=call.layout(a.input))
