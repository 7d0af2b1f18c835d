"""The table of rules under test: a new rule is one new row, a module and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.gradients import rule_cases_mixed, rule_cases_more

Inputs = Callable[[int, torch.dtype], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    module: Callable[[], nn.Module]
    inputs: Inputs
    empty: bool = True  # whether torch itself runs it on no examples

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"

    @property
    def mapped(self) -> bool:
        """Returns whether every operation has the batch on axis 0, as the mode without rules expects."""
        return self.name != "places along the second axis"


def reals(*shapes: tuple[int, ...]) -> Inputs:
    """Returns normal inputs, one for each shape, which lacks the batch axis."""
    return lambda size, dtype: tuple(torch.randn(size, *shape, dtype=dtype) for shape in shapes)


def ids(entries: int, *shape: int) -> Inputs:
    return lambda size, dtype: (torch.randint(0, entries, (size, *shape)),)


def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:  # (B,)
    """Returns a loss of each example that weighs every output differently."""
    outputs = module(*batch)
    losses = 0.0
    for k, output in enumerate(o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None):
        flat = output.reshape(output.shape[0], output[:1].numel())
        weights = torch.linspace(-1.0, 2.0, flat.shape[1], dtype=flat.dtype)
        losses = losses + (flat * weights + (k + 1) * flat.square() / 8).sum(1)
    return losses


class Twice(nn.Module):
    """One layer used twice in a forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Indexed(nn.Module):
    """A bare table that is looked up in several ways."""

    def __init__(self, way: str, *shape: int) -> None:
        super().__init__()
        self.way = way
        self.table = nn.Parameter(torch.randn(*shape))

    def forward(self, places: Tensor) -> Tensor:
        match self.way:
            case "getitem":
                return self.table[places - 2]
            case "tuple":
                return self.table[(places,)]
            case "select":
                return torch.index_select(self.table, 0, places.flatten()).view(*places.shape, *self.table.shape[1:])
            case "torch":
                return torch.embedding(self.table, places, 2)
            case "twice":
                return F.embedding(places, self.table).cumsum(1) * F.embedding(places.flip(1), self.table)
            case _:
                raise ValueError(self.way)


class Merged(nn.Module):
    """A layer that sees batch and positions on one axis."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ChannelsLast(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.contiguous(memory_format=torch.channels_last))


def _convolutions() -> list[Case]:
    image, line, block = reals((8, 9, 7)), reals((8, 11)), reals((4, 4, 5, 3))
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("conv2d, stride and padding", lambda: nn.Conv2d(8, 6, 3, 2, 1), image),
        ("conv2d of few channels", lambda: nn.Conv2d(2, 6, (3, 2), 1, (2, 0)), reals((2, 6, 7))),
        ("conv2d, no bias, 1x1, stride", lambda: nn.Conv2d(8, 6, 1, 2, bias=False), image),
        ("conv2d, groups, dilation", lambda: nn.Conv2d(8, 12, (3, 2), (1, 2), (2, 0), (2, 1), groups=4), image),
        ("conv2d, depthwise", lambda: nn.Conv2d(8, 16, 3, groups=8), image),
        ("conv2d, same", lambda: nn.Conv2d(8, 6, (3, 5), padding="same", dilation=(1, 2)), image),
        ("conv2d, valid", lambda: nn.Conv2d(8, 6, 3, padding="valid"), image),
        ("conv2d, circular", lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), image),
        ("conv2d, reflect, same", lambda: nn.Conv2d(8, 6, 4, padding="same", padding_mode="reflect"), image),
        ("conv2d, used twice", lambda: Twice(nn.Conv2d(8, 8, 3, padding=1)), image),
        ("conv2d, channels last", lambda: ChannelsLast(nn.Conv2d(8, 6, 3, 2, 1)), image),
        ("conv2d, channels last, groups", lambda: ChannelsLast(nn.Conv2d(8, 6, 3, 2, 1, groups=2)), image),
        ("conv2d, small maps", lambda: nn.Conv2d(16, 32, 3, padding=1), reals((16, 2, 2))),
        ("conv2d, batch and positions merged", lambda: Merged(nn.Conv2d(3, 4, 3)), reals((2, 3, 5, 4))),
        ("conv1d", lambda: nn.Conv1d(8, 6, 3, 2, 1), line),
        ("conv1d, groups, dilation", lambda: nn.Conv1d(8, 6, 3, 1, 2, 2, groups=2), line),
        ("conv3d", lambda: nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), 1), block),
        ("conv_transpose2d", lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), reals((8, 4, 3))),
        ("conv_transpose2d, groups", lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 2, 2, dilation=3), reals((8, 4, 3))),
        ("conv_transpose1d", lambda: nn.ConvTranspose1d(6, 8, 3, 3, 1, 2), reals((6, 5))),
        ("conv_transpose3d", lambda: nn.ConvTranspose3d(4, 3, (2, 3, 1), 2, (0, 1, 0)), block),
    ]  # fmt: skip
    return [Case("convolution", *row) for row in rows]


def _embeddings() -> list[Case]:
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("many entries", lambda: nn.Embedding(50, 5), ids(50, 7)),
        ("repeated ids", lambda: nn.Embedding(3, 70), ids(3, 9)),
        ("padding", lambda: nn.Embedding(4, 5, padding_idx=1), ids(4, 9)),
        ("padding from the end", lambda: nn.Embedding(4, 5, padding_idx=-1), ids(4, 9)),
        ("one id each", lambda: nn.Embedding(5, 3), ids(5)),
        ("ids with two axes", lambda: nn.Embedding(6, 3), ids(6, 2, 3)),
        ("getitem", lambda: Indexed("getitem", 6, 2, 3), ids(6, 4)),
        ("getitem of a tuple", lambda: Indexed("tuple", 6, 3), ids(6, 4)),
        ("index_select", lambda: Indexed("select", 6, 3), ids(6, 4)),
        ("torch.embedding with padding", lambda: Indexed("torch", 6, 3), ids(6, 4)),
        ("used twice", lambda: Indexed("twice", 6, 3), ids(6, 4)),
    ]
    return [Case("embedding", *row) for row in rows]


class _Free(nn.Module):
    """A norm with only one of its parameters."""

    def __init__(self, norm: nn.Module, without: str) -> None:
        super().__init__()
        self.norm = norm
        setattr(norm, without, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Called(nn.Module):
    """A scale and a shift given to a function of torch itself, by position."""

    def __init__(self, size: int, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.scale, self.shift)


def _normalizations() -> list[Case]:
    sequence, image = reals((5, 6)), reals((8, 3, 5))
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("layer norm", lambda: nn.LayerNorm(6), sequence),
        ("layer norm over all axes", lambda: nn.LayerNorm((5, 6)), sequence),
        ("layer norm without shift", lambda: nn.LayerNorm(6, bias=False), sequence),
        ("layer norm without scale", lambda: _Free(nn.LayerNorm(6), "weight"), sequence),
        ("layer norm of vectors", lambda: nn.LayerNorm(6), reals((6,))),
        ("layer norm used twice", lambda: Twice(nn.LayerNorm(6)), sequence),
        ("RMS norm", lambda: nn.RMSNorm(6), sequence),
        ("RMS norm over all axes, eps", lambda: nn.RMSNorm((5, 6), eps=1e-3), sequence),
        ("group norm", lambda: nn.GroupNorm(4, 8), image),
        ("group norm of one group", lambda: nn.GroupNorm(1, 8), reals((8, 4))),
        (
            "group norm, channels last",
            lambda: ChannelsLast(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))),
            image,
        ),
        ("group norm without shift", lambda: _Free(nn.GroupNorm(2, 8), "bias"), image),
        ("group norm used twice", lambda: Twice(nn.GroupNorm(2, 8)), image),
        ("torch.layer_norm", lambda: Called(6, lambda x, a, b: torch.layer_norm(x, [6], a, b)), sequence),
        ("torch.rms_norm", lambda: Called(6, lambda x, a, b: torch.rms_norm(x, [6], a) + b), sequence),
        ("torch.group_norm", lambda: Called(8, lambda x, a, b: torch.group_norm(x, 4, a, b)), image),
        (
            "torch.instance_norm",
            lambda: Called(8, lambda x, a, b: torch.instance_norm(x, a, b, None, None, True, 0.1, 1e-5, False)),
            image,
        ),
        ("instance norm", lambda: nn.InstanceNorm2d(8, affine=True), image),
        ("instance norm of lines", lambda: nn.InstanceNorm1d(3, affine=True), reals((3, 6))),
    ]
    return [Case("normalization", *row) for row in rows]


class Attended(nn.Module):
    """Attention of a sequence to itself, or to a second one."""

    def __init__(self, *, masks: str = "", call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.masks, self.call = masks, call or {}

    def forward(self, x: Tensor, *sources: Tensor) -> Any:
        size, length = x.shape[:2]
        source = sources[0] if sources else x
        value = sources[-1] if sources else x
        masks = {}
        causal = torch.ones(length, source.shape[1]).triu(1).bool()
        if "causal" in self.masks:
            masks["attn_mask"] = causal
        if "float" in self.masks:
            masks["attn_mask"] = torch.zeros_like(causal, dtype=x.dtype).masked_fill(causal, -1.5)
        if "heads" in self.masks:
            masks["attn_mask"] = causal.expand(2 * size, *causal.shape).clone()
        if "padding" in self.masks:
            masks["key_padding_mask"] = (source[..., 0].detach() > 0.8).index_fill(1, torch.tensor([0]), False)
        if self.attention.batch_first:
            return self.attention(x, source, value, **masks, **self.call)
        first = x.transpose(0, 1)
        others = [first] * 2 if not sources else [source.transpose(0, 1), value.transpose(0, 1)]
        output, weights = self.attention(first, *others, **masks, **self.call)
        return output.transpose(0, 1), weights


def _attentions() -> list[Case]:
    one, two, three = reals((4, 8)), reals((4, 8), (3, 8)), reals((4, 8), (3, 6), (3, 5))
    light = {"need_weights": False}
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("self", lambda: Attended(batch_first=True), one),
        ("self, batch on axis 1", Attended, one),
        ("self, weights by head", lambda: Attended(batch_first=True, call={"average_attn_weights": False}), one),
        ("self, light, causal", lambda: Attended(masks="causal", call={**light, "is_causal": True}), one),
        ("self, light, no bias", lambda: Attended(masks="float", bias=False, call=light), one),
        ("self, mask by head", lambda: Attended(masks="heads padding", batch_first=True), one),
        ("cross, one source", lambda: Attended(masks="causal", batch_first=True), two),
        ("cross, own sizes", lambda: Attended(kdim=6, vdim=5, batch_first=True), three),
        ("cross, two sources", Attended, reals((4, 8), (3, 8), (3, 8))),
        ("bias_k, zero", lambda: Attended(masks="heads padding", add_bias_kv=True, add_zero_attn=True), one),
        ("bias_k, light", lambda: Attended(masks="causal", add_bias_kv=True, batch_first=True, call=light), two),
        ("encoder layer", lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), one),
        ("decoder layer", lambda: nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True), two),
    ]
    return [Case("attention", *row, empty=False) for row in rows]  # the engine runs one example in place of none


class Sequenced(nn.Module):
    """A recurrent layer: all states and the last ones, from a first state of its own if `learned`."""

    def __init__(self, layer: nn.RNNBase, *, learned: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.first = nn.Parameter(torch.randn(1, 1, layer.hidden_size)) if learned else None

    def forward(self, x: Tensor) -> Any:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        first = None if self.first is None else self.first.expand(1, len(x), -1)
        if first is not None and isinstance(self.layer, nn.LSTM):
            first = (first, first * 0.5)
        states, last = self.layer(x, first)
        states = states if self.layer.batch_first else states.transpose(0, 1)
        return states, *(t.transpose(0, 1) for t in (last if isinstance(last, tuple) else (last,)))


class Packed(Sequenced):
    """The same on sequences of as many steps as the first number of each says: outputs filled up with zeros."""

    def forward(self, x: Tensor) -> Any:
        lengths = 1 + (37 * x[:, 0, 0].detach().abs()).nan_to_num(0, 0).long() % x.shape[1]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        first = None if self.first is None else self.first.expand(1, len(x), -1) * x[:, 0, :1]
        if first is not None and isinstance(self.layer, nn.LSTM):
            first = (first, first * 0.5)
        states, last = self.layer(packed, first)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        return states, *(t.transpose(0, 1) for t in (last if isinstance(last, tuple) else (last,)))


def _recurrences() -> list[Case]:
    first = {"batch_first": True}
    both = {**first, "bidirectional": True}
    rows: list[tuple[str, Callable[[], nn.Module]]] = [
        ("LSTM", lambda: Sequenced(nn.LSTM(3, 4, **first))),
        ("LSTM, batch on axis 1", lambda: Sequenced(nn.LSTM(3, 4))),
        ("LSTM, two layers, both directions", lambda: Sequenced(nn.LSTM(3, 4, 2, **both))),
        ("LSTM, no bias", lambda: Sequenced(nn.LSTM(3, 4, bias=False, **first))),
        ("LSTM, projected", lambda: Sequenced(nn.LSTM(3, 4, 2, proj_size=2, **both))),
        ("LSTM, first state learned", lambda: Sequenced(nn.LSTM(3, 4, **first), learned=True)),
        ("GRU", lambda: Sequenced(nn.GRU(3, 4, **first))),
        ("GRU, two layers, both directions", lambda: Sequenced(nn.GRU(3, 4, 2, bidirectional=True))),
        ("GRU, no bias", lambda: Sequenced(nn.GRU(3, 4, bias=False, **first))),
        ("GRU, first state learned", lambda: Sequenced(nn.GRU(3, 4, **first), learned=True)),
        ("RNN", lambda: Sequenced(nn.RNN(3, 4, 2, **both))),
        ("RNN, ReLU", lambda: Sequenced(nn.RNN(3, 4, nonlinearity="relu", **first))),
        ("LSTM, packed", lambda: Packed(nn.LSTM(3, 4), learned=True)),
        ("LSTM, packed, projected", lambda: Packed(nn.LSTM(3, 4, 2, proj_size=2, **both))),
        ("GRU, packed", lambda: Packed(nn.GRU(3, 4, 2, bidirectional=True))),
        ("RNN, packed", lambda: Packed(nn.RNN(3, 4, **both))),
    ]
    return [Case("recurrent", name, module, reals((5, 3)), empty=False) for name, module in rows]


def _more() -> list[Case]:
    families = {"bag": rule_cases_more.bags(), "form": rule_cases_more.forms(), "mixed": rule_cases_mixed.mixed()}
    return [
        Case(family, *row, empty=not any(word in row[0] for word in ("axis 1", "attention", "over heads")))
        for family, rows in families.items()
        for row in rows
    ]  # none on axis 1 is one that stands in for none; torch's own attention gives no examples no gradient


CASES = [*_convolutions(), *_embeddings(), *_normalizations(), *_attentions(), *_recurrences(), *_more()]
