"""Rows of packed sequences: how a packing, a recurrent layer and its opposite put the rows of a batch.

`pack_padded_sequence` sorts the batch by length, and puts its elements in the order of time: row i of the packed data
belongs to the example that the sort put there. So the owners of packed rows follow from the owners of what was packed
and from the sizes of the steps, and nothing has to be guessed:

    _pack_padded_sequence           rows by time; sorted place k at step t belongs to the example of sequence k
    lstm, gru, rnn_tanh, rnn_relu   packed data stay packed; last states lie as the sequences were sorted
    _pad_packed_sequence            the sequences again, as they were sorted

Axes: B examples, R rows, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privet.errors import UnsupportedModelError
from privet.gradients.capture.kept import Owners
from privet.gradients.capture.routing import Packing, Routed
from privet.gradients.layout import DoubtError
from privet.gradients.rules.arguments import named
from privet.gradients.tracing import tracing

__all__ = ["PACKS", "RECURRENT", "axis_packed", "packed", "require_alike", "through_packing"]

Found = list[tuple[Tensor, Routed]]

PACKS = "pack_padded_sequence"
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_PADS = "pad_packed_sequence"


def axis_packed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Returns the axis of the sequences in what is packed, or None if the call is not understood.

    Raises:
        UnsupportedModelError: while a graph is traced.
    """
    if tracing():
        raise UnsupportedModelError(
            "the model packs sequences, whose shapes depend on their lengths, which a graph cannot have. "
            "Expected compile=False. Or pad the sequences, and mask the outputs."
        )
    a = named(args, kwargs, input=None, lengths=None, batch_first=False)
    return None if a is None else 0 if a.batch_first else 1


def packed(order: Routed, sizes: tuple[int, ...]) -> Routed:
    """Returns the owners of rows by time, of which step t has the first `sizes[t]` of the sequences."""
    device = order.owner.device
    places = torch.arange(order.rows, device=device)
    held = places < torch.tensor(sizes, device=device).unsqueeze(1)
    return Routed(order.owner.expand(len(sizes), -1)[held], packing=Packing(order, sizes))


def through_packing(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, source: Routed
) -> Found | None:
    """Returns the tensors of a result with the owners of their rows, or None if these are not known.

    Args:
        name: of the function, as `base_name` says it.
        args: what it was given.
        kwargs: and by name.
        result: what it returned.
        source: the owners of the rows of its first argument.
    """
    if name == PACKS:
        fits = source.axis == axis_packed(args, kwargs)
        return [(result[0], packed(source, tuple(result[1].tolist())))] if fits else None
    packing = source.packing
    if packing is None:
        return None
    if name == _PADS:
        a = named(args, kwargs, input=None, batch_sizes=None, batch_first=False, padding_value=0.0, total_length=None)
        if a is None or packing.sizes != tuple(a.batch_sizes.tolist()):
            return None
        return [(result[0], packing.order.on_axis(0 if a.batch_first else 1)), (result[1], packing.order.on_axis(0))]
    if name in RECURRENT and isinstance(args[1], Tensor) and packing.sizes == tuple(args[1].tolist()):
        return [(result[0], source), *((last, packing.order.on_axis(1)) for last in result[1:])]
    return None


# -- what a recurrent layer asks ---------------------------------------------------------------------------------------


def require_alike(
    name: str,
    data: Tensor,
    sizes: Tensor | None,
    firsts: Sequence[Tensor],
    *,
    of: Owners,
    examples: int,
    again: bool,
) -> None:
    """Raises unless it is known whose the rows of a recurrent layer's data are, and its first states lie alike.

    Args:
        name: of the function.
        data: (R..., F).
        sizes: of the steps of packed data, else None.
        firsts: (layers, B, H) each.
        of: returns the owners of a tensor's rows, if they are known.
        examples: B.
        again: whether a part of the forward is computed again in the backward, where nobody follows rows.

    Raises:
        UnsupportedModelError: if data are packed, and it is not known whose the rows are.
        DoubtError: if they were moved since they were packed, or the first states lie in another order.
    """
    routed = of(data)
    packing = None if routed is None else routed.packing
    if sizes is not None and again:
        raise DoubtError(
            f"{name} met a packed sequence that is computed again by an activation checkpoint",
            "Pack inside of the model, and leave recurrent layers out of checkpoints.",
        )
    if sizes is not None and routed is None:
        raise UnsupportedModelError(
            f"{name} met a packed sequence, and nothing tells whose its rows are. Expected one that is packed "
            "inside of the model, by pack_padded_sequence, from a padded tensor that has the batch of the model's "
            "inputs on an axis. Let the data loader yield padded sequences and a tensor of their lengths, and "
            "pack in the forward."
        )
    if sizes is not None and (packing is None or packing.sizes != tuple(sizes.tolist())):
        raise DoubtError(
            f"{name} met rows of a packed sequence with the batch_sizes of another one, or in another order",
            "Pass data and batch_sizes of one packed sequence.",
        )
    order = routed if packing is None else packing.order
    for first in firsts:
        held = of(first)
        if (held is None and order is None) or not (first.requires_grad or bool(first.any())):
            continue
        here, there = (torch.arange(examples) if o is None else o.owner.cpu() for o in (order, held))
        if not torch.equal(here, there):
            raise DoubtError(
                f"{name} met first states in another order than its data",
                "Keep sorted_indices in a PackedSequence, so that torch sorts the first states too.",
            )
