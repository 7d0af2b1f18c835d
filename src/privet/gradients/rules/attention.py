"""Multi-head attention, taken apart: its parameters sit in projections, and what lies between them has none.

Axes: L target positions, S source positions, B examples (on axis 1, as torch's function has them), E features,
H heads, D = E/H. The projections are linear operations and captured as such, pieces of a packed matrix as derived
parameters; `bias_k` and `bias_v` are expanded over the examples. The rest is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.layout import Layout
from privet.gradients.rules.arguments import named
from privet.gradients.rules.free import expanded
from privet.gradients.rules.registry import Call, handles

__all__: list[str] = []


def _pieces(call: Call, t: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    """Returns the parts of a packed parameter along axis 0; derived parameters if it is watched."""
    if t is None:
        return [None] * len(sizes)
    return call.again(Tensor.split, t, list(sizes), 0)  # type: ignore[no-any-return]


def _projected(call: Call, a: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:  # (L, B, E), (S, B, E), (S, B, E)
    """Returns queries, keys and values."""
    size = a.query.shape[-1]
    if a.use_separate_proj_weight:
        biases = _pieces(call, a.in_proj_bias, [size] * 3)
        weights: Sequence[Tensor | None] = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    elif a.query is a.key and a.key is a.value:
        packed = call.again(F.linear, a.query, a.in_proj_weight, a.in_proj_bias)
        q, k, v = packed.split(size, dim=-1)
        return q, k, v
    elif a.key is a.value:
        biases = _pieces(call, a.in_proj_bias, [size, 2 * size])
        weights = _pieces(call, a.in_proj_weight, [size, 2 * size])
        query, both = (call.again(F.linear, x, w, b) for x, w, b in zip((a.query, a.key), weights, biases, strict=True))
        return query, *both.split(size, dim=-1)
    else:
        biases = _pieces(call, a.in_proj_bias, [size] * 3)
        weights = _pieces(call, a.in_proj_weight, [size] * 3)
    q, k, v = (
        call.again(F.linear, x, w, b) for x, w, b in zip((a.query, a.key, a.value), weights, biases, strict=True)
    )
    return q, k, v


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Returns a mask as numbers to be added: minus infinity where a mask of truth values hides."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise UnsupportedModelError(f"an attention mask has dtype {mask.dtype}. Expected bool or floating point.")
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _masks(a: SimpleNamespace, examples: int, sources: int) -> Tensor | None:
    """Returns the sum of both masks over the given sources, broadcastable to (B, H, L, S); None for no mask."""
    mask, padding = _additive(a.attn_mask, a.query), _additive(a.key_padding_mask, a.query)
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask.reshape(examples, a.num_heads, *mask.shape[1:])
        mask = F.pad(mask, (0, sources - mask.shape[-1]))  # for what bias_k and add_zero_attn have appended
    if padding is not None:
        padding = F.pad(padding, (0, sources - padding.shape[-1])).view(examples, 1, 1, sources)
        mask = padding if mask is None else mask + padding
    return mask


def _heads(t: Tensor, heads: int) -> Tensor:  # (S, B, E) -> (B, H, S, D)
    return t.view(*t.shape[:2], heads, t.shape[2] // heads).permute(1, 2, 0, 3)


def _static(t: Tensor, heads: int) -> Tensor:  # (B H, S, D) -> (B, H, S, D)
    return t.reshape(t.shape[0] // heads, heads, *t.shape[1:])


def _sources(call: Call, a: SimpleNamespace, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # -> (B, H, S', D)
    """Returns keys and values by head, with what is appended to them."""
    examples, size = k.shape[1:]
    if a.bias_k is not None:
        if a.static_k is not None or a.static_v is not None:
            raise UnsupportedModelError("attention has both bias_k and static_k or static_v. Expected one of them.")
        shape = (1, examples, size)
        k = torch.cat([k, call.again(Tensor.expand, a.bias_k, shape)])
        v = torch.cat([v, call.again(Tensor.expand, a.bias_v, shape)])
    keys = _heads(k, a.num_heads) if a.static_k is None else _static(a.static_k, a.num_heads)
    values = _heads(v, a.num_heads) if a.static_v is None else _static(a.static_v, a.num_heads)
    if a.add_zero_attn:
        keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
    return keys, values


def _attended(
    a: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # (B, H, L, D), and (B, [H,] L, S) or None
    """Returns the values that the queries find, and the attention weights if they are wanted."""
    dropout = a.dropout_p if a.training else 0.0
    if not a.need_weights:
        causal = a.is_causal and a.key_padding_mask is None
        return F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return weights @ v, weights.mean(1) if a.average_attn_weights else weights


@handles(F.multi_head_attention_forward, structural=True)
def _attention(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(
        args, kwargs, query=None, key=None, value=None, embed_dim_to_check=None, num_heads=None, in_proj_weight=None,
        in_proj_bias=None, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=None,
        out_proj_bias=None, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
        use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None,
        static_v=None, average_attn_weights=True, is_causal=False,
    )  # fmt: skip
    if a is None:
        return NotImplemented
    _check(a)
    q, k, v = _projected(call, a)
    keys, values = _sources(call, a, k, v)
    mask = _masks(a, q.shape[1], keys.shape[2])
    found, weights = _attended(a, _heads(q, a.num_heads), keys, values, mask=mask)
    joined = found.permute(2, 0, 1, 3).reshape(q.shape)
    return call.again(F.linear, joined, a.out_proj_weight, a.out_proj_bias), weights


def _check(a: SimpleNamespace) -> None:
    """Raises an error for calls that torch would refuse, and for one example without a batch axis."""
    if a.query.dim() != 3:
        raise UnsupportedModelError(
            f"attention met a query of shape {tuple(a.query.shape)}. Expected three axes. Add a batch axis, of size 1 "
            "if need be."
        )
    if a.is_causal and a.attn_mask is None:
        raise UnsupportedModelError("attention has is_causal=True without attn_mask. Expected the causal mask as well.")
    if a.embed_dim_to_check != a.query.shape[-1] or a.query.shape[-1] % a.num_heads:
        raise UnsupportedModelError(
            f"attention met {a.query.shape[-1]} features. Expected {a.embed_dim_to_check}, a multiple of {a.num_heads}."
        )


@handles(F.scaled_dot_product_attention, structural=True)
def _with_mask(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter as the mask, such as relative positions: expanded over the examples, all else is torch's own."""
    a = named(
        args, kwargs,
        query=None, key=None, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    )  # fmt: skip
    if a is None or not call.is_root(a.attn_mask) or any(map(call.is_root, (a.query, a.key, a.value))):
        return NotImplemented
    layout = call.layout(a.query)
    if layout is Layout.CONSTANT or call.layout(a.key) is not layout or call.layout(a.value) is not layout:
        return NotImplemented
    mask = expanded(call, a.attn_mask, (*a.query.shape[:-1], a.key.shape[-2]), layout)
    return func(a.query, a.key, a.value, mask, a.dropout_p, a.is_causal, scale=a.scale, enable_gqa=a.enable_gqa)
