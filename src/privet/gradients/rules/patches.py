"""Convolutions seen as matrices: at each place of the output, the patch of the input that it looks at.

Axes: R rows, C source channels, O field channels, G groups, T places of the field (all spatial axes), D = C/G * kernel.
A convolution's weight gradient pairs its input (the *source*, looked at through the kernel) with its output's gradient
(the *field*, one value at each place). In a transposed convolution the two change places. All else is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from privet.gradients.rules.pool import scratch
from privet.gradients.tracing import tracing

__all__ = ["Pairing"]

_CHUNK = {"pixels": 2**20, "planes": 2**18}  # elements of one chunk of patches: what stays in cache
_SMALL = 2**16  # elements
_ALONE = 2**12, 2**16  # elements of gradients of single channels: what outweighs a call, and what stays in cache
_WINDOW = 16  # elements of a kernel from which on windows are faster than patches copied out


@dataclass(frozen=True, eq=False)
class Pairing:
    """Source and field of one convolution, such that row i's gradient is `sum_t field_it patch_it^T` in each group."""

    source: Tensor  # (R, C, *S)
    field: Tensor  # (R, O, *T)
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rows(self) -> int:
        """Returns R."""
        return self.source.shape[0]

    @cached_property
    def places(self) -> int:
        """Returns T."""
        return math.prod(self.field.shape[2:])

    @cached_property
    def depth(self) -> int:
        """Returns D."""
        return self.source.shape[1] // self.groups * math.prod(self.kernel)

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """Returns the spatial shape of the padded source, as far as the kernel reaches."""
        ends = zip(self.source.shape[2:], self.padding, self._reach(), strict=True)
        return tuple(max(size + 2 * pad, reach) for size, pad, reach in ends)

    def _reach(self) -> list[int]:
        steps = zip(self.field.shape[2:], self.stride, self.kernel, self.dilation, strict=True)
        return [max(t - 1, 0) * s + (k - 1) * d + 1 for t, s, k, d in steps]

    @cached_property
    def pixels_first(self) -> bool:
        """Returns whether patches are better copied pixel by pixel than channel by channel."""
        channels = self.source.shape[1]
        single = math.prod(self.kernel) == 1 and self.source.is_contiguous()
        # What lies together in memory: a kernel's row over all channels, or a row of places where the stride is 1.
        runs = channels > 4 or (self.stride[-1] > 1 and self.dilation[-1] == 1 and channels * self.kernel[-1] >= 8)
        return self.groups == 1 and runs and not single

    @property
    def place_by_place(self) -> bool:
        """Returns whether each channel is alone, so that its gradient is no matrix product, and best added up as it is.

        A product of one row for each channel of each example would be a call for some hundred multiplications.
        """
        alone = self.groups == self.source.shape[1] == self.field.shape[1]
        window = math.prod(self.kernel)
        large = window >= _WINDOW and self.rows * self.groups * window >= _ALONE[0]
        return alone and large and self.source.is_cpu and not tracing()

    def narrowed(self, start: int, stop: int) -> Pairing:
        """Returns the pairing of some rows alone."""
        return Pairing(
            self.source[start:stop], self.field[start:stop],
            self.kernel, self.stride, self.padding, self.dilation, self.groups,
        )  # fmt: skip

    def instantiated(self) -> Tensor:  # (R, O, C/G, *kernel)
        """Returns every row's gradient, as a view whose order in memory is that in which it was cheapest to form."""
        rows, channels, outputs = self.rows, self.source.shape[1], self.field.shape[1]
        if self.place_by_place:
            step = max(1, _ALONE[1] // (channels * math.prod(self.kernel)))
            return torch.cat([_added_up(self.narrowed(start, start + step)) for start in range(0, rows, step)])
        turned = self.groups == 1 and self.depth < outputs  # a product is faster with its longer side last
        sides = (self.depth, outputs) if turned else (outputs, self.depth)
        gradients = scratch((rows, *sides), self.source)
        if gradients.numel() and not self.places:
            gradients.zero_()
        elif gradients.numel():
            patches = self._patches_by_pixel() if self.pixels_first else self._patches_by_plane()
            step = self._rows_at_once()
            copies = scratch((min(step, rows), *patches.shape[1:]), self.source)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                copied = copies[:count].copy_(patches[start : start + count])
                self._multiply(copied, start, gradients[start : start + count], turned=turned)
        if turned:
            gradients = gradients.mT
        if self.pixels_first:
            return gradients.unflatten(2, (*self.kernel, channels)).movedim(-1, 2)  # type: ignore[no-any-return, no-untyped-call]
        return gradients.unflatten(2, (channels // self.groups, *self.kernel))  # type: ignore[no-any-return, no-untyped-call]

    def _rows_at_once(self) -> int:
        """Returns how many rows' patches to copy at once: a multiple of the threads, each of which takes whole rows."""
        wanted = _CHUNK["pixels" if self.pixels_first else "planes"] / max(self.places * self.depth, 1)
        threads = torch.get_num_threads()
        return max(1, math.ceil(wanted / threads)) * threads

    def _multiply(self, copied: Tensor, start: int, out: Tensor, *, turned: bool) -> None:
        count, groups = len(copied), self.groups
        field = self.field_matrix(start, start + count)  # (count, O, T)
        if groups > 1:
            field = field.reshape(count * groups, -1, self.places)
            out = out.view(count * groups, -1, self.depth)
        if self.pixels_first:
            patches = copied.view(count, self.places, self.depth)
        else:
            patches = copied.view(count * groups, self.depth, self.places).mT
        if turned:
            torch.bmm(patches.mT, field.mT, out=out)
        else:
            torch.bmm(field, patches, out=out)

    def field_matrix(self, start: int, stop: int) -> Tensor:  # (stop - start, O, T)
        """Returns the field of some rows as matrices, a view if it can be."""
        field = self.field[start:stop]
        last = field.movedim(1, -1)
        if last.is_contiguous():
            return last.reshape(stop - start, self.places, -1).mT
        return field.contiguous().view(stop - start, -1, self.places)

    def _padded_source(self, shape: tuple[int, ...], *, channels_last: bool) -> Tensor:
        """Returns the source with its zero border, in memory order (R, *shape, C) or (R, C, *shape)."""
        rows, channels = self.source.shape[:2]
        source = self.source.movedim(1, -1) if channels_last else self.source
        if shape == tuple(self.source.shape[2:]):
            return source.contiguous()
        whole = scratch((rows, *shape, channels) if channels_last else (rows, channels, *shape), self.source)
        first = 1 if channels_last else 2
        inner = whole
        small = whole.numel() < _SMALL
        if small:  # one call for all of it costs less than one for each side of the border
            whole.zero_()
        for axis, (pad, size) in enumerate(zip(self.padding, self.source.shape[2:], strict=True), start=first):
            if not small:
                inner.narrow(axis, 0, pad).zero_()
                inner.narrow(axis, pad + size, inner.shape[axis] - pad - size).zero_()
            inner = inner.narrow(axis, pad, size)
        inner.copy_(source)
        return whole

    def _patches_by_pixel(self) -> Tensor:  # (R, *T, *kernel, C)
        whole = self._padded_source(self.padded, channels_last=True)
        first, *pitches, last = whole.stride()
        steps = [p * s for p, s in zip(pitches, self.stride, strict=True)]
        hops = [p * d for p, d in zip(pitches, self.dilation, strict=True)]
        shape = (self.rows, *self.field.shape[2:], *self.kernel, self.source.shape[1])
        return whole.as_strided(shape, (first, *steps, *hops, last))

    def _patches_by_plane(self) -> Tensor:  # (R, C, *kernel, *T)
        whole = self._padded_source(self.padded, channels_last=False)
        first, plane, *pitches = whole.stride()
        steps = [p * s for p, s in zip(pitches, self.stride, strict=True)]
        hops = [p * d for p, d in zip(pitches, self.dilation, strict=True)]
        shape = (self.rows, self.source.shape[1], *self.kernel, *self.field.shape[2:])
        return whole.as_strided(shape, (first, plane, *hops, *steps))

    def grams(self) -> tuple[Tensor, Tensor]:  # (R, T, T), (R, T, T)
        """Returns the inner products of patches with each other, and of field values with each other; one group.

        The inner products of pixels come first, and the patches' are sums of them, shifted alike along both axes: one
        axis of the kernel after the other, `k - 1` additions for each.
        """
        whole = self._padded_source(self.padded, channels_last=True).flatten(1, -2)
        shape = self.padded
        products = scratch((self.rows, whole.shape[1], whole.shape[1]), whole)
        torch.bmm(whole, whole.mT, out=products)
        total = products.view(self.rows, *shape, *shape)
        for axis, (k, s, d, t) in enumerate(
            zip(self.kernel, self.stride, self.dilation, self.field.shape[2:], strict=True), start=1
        ):
            other = axis + len(shape)
            span = (t - 1) * s + 1
            views = [_strided(_strided(total, axis, i * d, span, s), other, i * d, span, s) for i in range(k)]
            if k == 1:
                total = views[0]
                continue
            total = torch.add(views[0], views[1], out=scratch(views[0].shape, whole))
            for view in views[2:]:
                total.add_(view)
        field = self.field_matrix(0, self.rows)
        inner = torch.bmm(field.mT, field, out=scratch((self.rows, self.places, self.places), whole))
        return total.reshape(self.rows, self.places, self.places), inner


def _strided(t: Tensor, axis: int, start: int, span: int, step: int) -> Tensor:
    return t[(slice(None),) * axis + (slice(start, start + span, step),)]


def _added_up(pairing: Pairing) -> Tensor:  # (R, C, 1, *kernel)
    """Returns every row's gradient where channels are alone: for each place, all channels of all rows at once."""
    count, axes = pairing.rows * pairing.groups, len(pairing.kernel)
    whole = scratch((*pairing.padded, count), pairing.source).zero_()
    inner = whole
    for axis, (pad, size) in enumerate(zip(pairing.padding, pairing.source.shape[2:], strict=True)):
        inner = inner.narrow(axis, pad, size)
    inner.copy_(pairing.source.flatten(0, 1).movedim(0, -1))
    field = pairing.field.reshape(count, pairing.places).t().contiguous()
    pitches = whole.stride()[:-1]
    steps = [p * s for p, s in zip(pitches, pairing.stride, strict=True)]
    hops = [p * d for p, d in zip(pitches, pairing.dilation, strict=True)]
    windows = whole.as_strided((*pairing.field.shape[2:], *pairing.kernel, count), (*steps, *hops, 1))
    sums = scratch((*pairing.kernel, count), whole).zero_()
    for window, values in zip(_leaves(windows, axes), field.unbind(0), strict=True):
        sums.addcmul_(window, values)
    return sums.movedim(-1, 0).reshape(pairing.rows, pairing.groups, 1, *pairing.kernel)


def _leaves(t: Tensor, axes: int) -> Iterator[Tensor]:
    """Yields the tensors at each index of the first axes."""
    if not axes:
        yield t
        return
    for part in t.unbind(0):
        yield from _leaves(part, axes - 1)
