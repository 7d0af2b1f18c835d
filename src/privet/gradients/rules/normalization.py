"""Normalisation within one example: layer, RMS, group and instance norm.

Axes: B examples, T positions, D normalised features, C channels, G groups of channels. The scale's gradient is the sum
over an example's positions of `gradient * normalised input`, the shift's that of the gradient: (B, D) each, which is
instantiated. The normalised input is formed as `(x - mean) * rstd`, not as a difference of two large sums.

On inputs in channels_last order torch's own group norm errs by some 1e-5 in float32; it runs as the model calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.rows import summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.pool import scratch
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]

_aten = torch.ops.aten


def _three(use: Use) -> tuple[Tensor, Tensor, Tensor]:
    x, mean, rstd = use.data
    assert x is not None
    assert rstd is not None
    return wide(x), wide(torch.zeros_like(rstd) if mean is None else mean), wide(rstd)


class _FeatureScale(Rule):
    """The scale of a layer or RMS norm: `sum_t g_t (x_t - mean_t) rstd_t`."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([self._of(use) for use in uses])

    def _of(self, use: Use) -> Tensor:  # (B, *shape)
        x, mean, rstd = _three(use)
        rows, features = use.rows, math.prod(use.shape)
        positions = math.prod(x.shape[1:]) // max(features, 1)
        as_sequence = (rows, positions, features)
        buffer = scratch(as_sequence, x)
        torch.sub(x.reshape(as_sequence), mean.reshape(rows, positions, 1), out=buffer)
        buffer.mul_(wide(use.gradient).reshape(as_sequence))
        return torch.bmm(rstd.reshape(rows, 1, positions), buffer).view(rows, *use.shape)


class _FeatureShift(Rule):
    """The shift of a layer norm: the sum of the gradient over the positions."""

    def per_example(self, uses: Uses) -> Tensor:
        sums = [wide(use.gradient).reshape(use.rows, -1, *use.shape).sum(1) if use.gradient.numel() else _none(use)
                for use in uses]  # fmt: skip
        return summed(sums)


def _none(use: Use) -> Tensor:
    return wide(use.gradient).new_zeros(use.rows, *use.shape)


class _ChannelScale(Rule):
    """The scale of a group norm: the sum over an example's places of `g (x - mean) rstd`, by channel."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([self._of(use) for use in uses])

    def _of(self, use: Use) -> Tensor:  # (B, C)
        x, mean, rstd = _three(use)
        rows, channels = x.shape[:2]
        if not x.numel():
            return _none(use)
        per_channel = (rows, channels, *[1] * (x.dim() - 2))
        spread = channels // mean.shape[1]
        mean, rstd = (t.repeat_interleave(spread, dim=1) for t in (mean, rstd))
        buffer = scratch(x.shape, x)
        if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
            buffer = buffer.view(rows, *x.shape[2:], channels).movedim(-1, 1)  # as x lies
        torch.sub(x, mean.view(per_channel), out=buffer).mul_(wide(use.gradient))
        return _over_places(buffer) * rstd


def _over_places(t: Tensor) -> Tensor:  # (B, C, *places) -> (B, C)
    return t.sum(tuple(range(2, t.dim()))) if t.dim() > 2 else t


class _ChannelShift(Rule):
    """The shift of a group norm: the sum of the gradient over an example's places."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([_over_places(wide(use.gradient)) for use in uses])


class LayerNorm(Operation):
    """Normalisation over the last axes."""

    positionwise = True
    rules: Mapping[str, Rule] = {"weight": _FeatureScale(), "bias": _FeatureShift()}

    def __init__(self, shape: Sequence[int], eps: float) -> None:
        self._shape = tuple(shape)
        self._eps = eps
        self._mean = self._rstd = torch.empty(0)

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the scaled and shifted input; keeps its mean and inverse standard deviation."""
        weight, bias = values.get("weight"), values.get("bias")
        output, self._mean, self._rstd = torch.native_layer_norm(data[0], self._shape, weight, bias, self._eps)
        return output

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns input, mean and inverse standard deviation."""
        return (data[0], self._mean, self._rstd)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the input's gradient alone."""
        (x,) = data
        weight, bias = values.get("weight"), values.get("bias")
        result = _aten.native_layer_norm_backward(
            gradient.to(x.dtype), x, self._shape, self._mean, self._rstd, weight, bias, [True, False, False]
        )
        return [result[0]]


class RMSNorm(Operation):
    """Division by the root of the mean square over the last axes."""

    positionwise = True
    rules: Mapping[str, Rule] = {"weight": _FeatureScale()}

    def __init__(self, shape: Sequence[int], eps: float | None) -> None:
        self._shape = tuple(shape)
        self._axes = tuple(range(-len(self._shape), 0))
        self._eps = eps
        self._rstd = torch.empty(0)

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the scaled input; keeps its inverse root mean square."""
        (x,) = data
        eps = torch.finfo(x.dtype).eps if self._eps is None else self._eps
        self._rstd = wide(x).square().mean(self._axes, keepdim=True).add_(eps).rsqrt_()
        return torch.rms_norm(x, self._shape, values.get("weight"), self._eps)

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns input, no mean, and inverse root mean square."""
        return (data[0], None, self._rstd)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the input's gradient."""
        x, weight, rstd = wide(data[0]), values.get("weight"), self._rstd
        gradient = wide(gradient) if weight is None else wide(gradient) * wide(weight)
        normalised = x * rstd
        along = (gradient * normalised).mean(self._axes, keepdim=True)
        return [(gradient - normalised.mul_(along)).mul_(rstd).to(data[0].dtype)]


class GroupNorm(Operation):
    """Normalisation over groups of channels and all places of one example; rows on axis 0."""

    rules: Mapping[str, Rule] = {"weight": _ChannelScale(), "bias": _ChannelShift()}

    def __init__(self, groups: int, eps: float) -> None:
        self._groups = groups
        self._eps = eps
        self._mean = self._rstd = torch.empty(0)

    @staticmethod
    def _dense(t: Tensor, *, like: Tensor) -> Tensor:
        """Returns `t` without gaps, in channels_last order where `like` is."""
        if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
            return t.contiguous(memory_format=torch.channels_last)
        return t.contiguous()

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the scaled and shifted input; keeps its groups' means and inverse standard deviations."""
        x = self._dense(data[0], like=data[0])
        rows, channels = x.shape[:2]
        places = math.prod(x.shape[2:])
        output, self._mean, self._rstd = torch.native_group_norm(
            x, values.get("weight"), values.get("bias"), rows, channels, places, self._groups, self._eps
        )
        return output

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns input, means and inverse standard deviations."""
        return (data[0], self._mean, self._rstd)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the input's gradient alone."""
        x = self._dense(data[0], like=data[0])
        rows, channels = x.shape[:2]
        if not x.numel():
            return [torch.zeros_like(x)]
        gradient = self._dense(gradient.to(x.dtype), like=x)
        result = _aten.native_group_norm_backward(
            gradient, x, self._mean, self._rstd, values.get("weight"), rows, channels, math.prod(x.shape[2:]),
            self._groups, [True, False, False],
        )  # fmt: skip
        return [result[0]]


def _applied(call: Call, a: SimpleNamespace, operation: Operation) -> Any:
    """Returns the captured normalisation, or NotImplemented if its scale or shift is neither parameter nor constant."""
    roots = {"weight": a.weight, "bias": getattr(a, "bias", None)}
    constants = [t for t in roots.values() if t is not None and not call.is_root(t)]
    if call.is_root(a.input) or any(t.requires_grad for t in constants):
        return NotImplemented
    return call.apply(operation, (a.input,), roots)


@handles(F.layer_norm, torch.layer_norm)
def _layer_norm(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5, cudnn_enable=True)
    return NotImplemented if a is None else _applied(call, a, LayerNorm(a.normalized_shape, a.eps))


@handles(F.rms_norm, torch.rms_norm)
def _rms_norm(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, normalized_shape=None, weight=None, eps=None)
    return NotImplemented if a is None else _applied(call, a, RMSNorm(a.normalized_shape, a.eps))


@handles(F.group_norm, torch.group_norm)
def _group_norm(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, num_groups=1, weight=None, bias=None, eps=1e-5, cudnn_enabled=True)
    return NotImplemented if a is None else _applied(call, a, GroupNorm(a.num_groups, a.eps))


@handles(F.instance_norm, torch.instance_norm)
def _instance_norm(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.instance_norm:
        a = named(
            args, kwargs, input=None, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
            momentum=0.1, eps=1e-5,
        )  # fmt: skip
    else:
        a = named(
            args, kwargs, input=None, weight=None, bias=None, running_mean=None, running_var=None, use_input_stats=True,
            momentum=0.1, eps=1e-5, cudnn_enabled=True,
        )  # fmt: skip
    if a is None:
        return NotImplemented
    if a.running_mean is not None or a.running_var is not None or not a.use_input_stats:
        names = ", ".join(call.label(t) for t in (a.weight, a.bias) if call.is_root(t))
        raise UnsupportedModelError(
            f"instance norm with {names} keeps running statistics: they would carry the data of all examples, without "
            "noise. Expected track_running_stats=False."
        )
    if math.prod(a.input.shape[2:]) == 1:
        raise ValueError(
            f"instance norm met an input of shape {tuple(a.input.shape)}. Expected more than one place in a channel."
        )
    return _applied(call, a, GroupNorm(a.input.shape[1], a.eps))
