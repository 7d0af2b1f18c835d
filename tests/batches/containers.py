"""The containers of the tests: how a batch is made of x and y, and how a model finds x and y in it.

Two classes imitate those of Hugging Face's transformers, which need not be installed. Where it is, its own are used as
well.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import MappingKey, register_pytree_node

T = 5
"""Features of x, or positions where x is a packed sequence."""


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor
    split: str = "train"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor


@dataclass
class Counting:
    """A dataclass that works something out of its fields, and keeps a tensor that is no argument."""

    x: Tensor
    y: Tensor
    count: int = field(init=False)
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.count, self.doubled = len(self.x), 2 * self.x


class Encoding(UserDict[str, Any]):
    """As transformers.BatchEncoding: not a dict, with more arguments, attributes beside the values, and `enc.ids`."""

    def __init__(self, data: Mapping[str, Any] | None = None, encoding: Any = None, n_sequences: int | None = None):
        super().__init__(data)
        self._encodings, self._n_sequences = encoding, n_sequences

    def __getattr__(self, item: str) -> Any:
        try:
            return self.data[item]
        except KeyError:
            raise AttributeError from None


@dataclass
class Output(OrderedDict[str, Any]):
    """As transformers.ModelOutput: an OrderedDict and a dataclass, without the fields that are None."""

    x: Tensor | None = None
    y: Tensor | None = None
    attentions: Tensor | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is not None:
                OrderedDict.__setitem__(self, f.name, getattr(self, f.name))


class ReadOnly(Mapping[str, Any]):
    """A mapping that is no dict and cannot be written to."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Registered:
    """A class that its author told torch how to take apart."""

    def __init__(self, x: Any, y: Any, name: str) -> None:
        self.x, self.y, self.name = x, y, name


class Nameless(Registered):
    """The same, registered without names for its parts."""


register_pytree_node(
    Registered,
    lambda r: ([r.x, r.y], r.name),
    lambda parts, name: Registered(*parts, name),
    flatten_with_keys_fn=lambda r: ([(MappingKey("x"), r.x), (MappingKey("y"), r.y)], r.name),
)
register_pytree_node(Nameless, lambda r: ([r.x, r.y], r.name), lambda parts, name: Nameless(*parts, name))


def packed(x: Tensor, *, enforce_sorted: bool = False) -> PackedSequence:  # x (B, T), zeros behind each sequence
    if not len(x):
        nowhere = torch.zeros(0, dtype=torch.int64)
        order = None if enforce_sorted else nowhere
        return PackedSequence(x.new_zeros(0), nowhere, order, order)
    places = torch.arange(1, x.shape[1] + 1)
    lengths = ((x != 0) * places).amax(1).clamp(min=1)
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)


def unpacked(sequences: PackedSequence) -> Tensor:  # (B, T)
    return pad_packed_sequence(sequences, batch_first=True, total_length=T)[0]


@dataclass(frozen=True)
class Form:
    """One row of the table."""

    make: Callable[[Tensor, Tensor], Any]
    x_of: Callable[[Any], Tensor]
    y_of: Callable[[Any], Tensor]
    fills: bool = True  # whether there are zeros for all of it
    graph: bool = True  # whether it can be an input of a graph
    sorted: bool = False  # whether it wants the longest sequences first
    key: str | None = None  # the path of y, where `made_wrong` finds it


def _attributes(make: Callable[[Tensor, Tensor], Any], **options: Any) -> Form:
    return Form(make, lambda b: b.x, lambda b: b.y, key=".y", **options)


def _keys(make: Callable[[Tensor, Tensor], Any], **options: Any) -> Form:
    return Form(make, lambda b: b["x"], lambda b: b["y"], key="['y']", **options)


def _elements(make: Callable[[Tensor, Tensor], Any], **options: Any) -> Form:
    return Form(make, lambda b: b[0], lambda b: b[1], key="[1]", **options)


def _names(x: Tensor) -> list[str]:
    return [f"{float(row.sum()):.6f}" for row in x.detach()]


def _named_x(b: Any) -> Tensor:
    """Returns x, once the columns beside it were seen to be of the same examples."""
    x: Tensor = b["x"]
    if len(b["names"]):  # none for an example that was made up
        assert b["names"] == _names(x)
        assert [float(n) for n in b["sums"]] == [float(n) for n in b["names"]]
    return x


def _packed_x(b: Any) -> Tensor:
    return unpacked(b["x"])


FORMS: dict[str, Form] = {
    "tuple": _elements(lambda x, y: (x, y)),
    "list": _elements(lambda x, y: [x, y]),
    "deque": _elements(lambda x, y: deque([x, y])),
    "namedtuple": _attributes(Pair),
    "dict": _keys(lambda x, y: {"x": x, "y": y, "split": "train", "scale": torch.tensor(2.0), "n": None}),
    "OrderedDict": _keys(lambda x, y: OrderedDict(x=x, y=y)),
    "defaultdict": _keys(lambda x, y: defaultdict(list, x=x, y=y)),
    "UserDict": _keys(lambda x, y: Encoding({"x": x, "y": y})),
    "a mapping of one's own": _keys(lambda x, y: ReadOnly({"x": x, "y": y})),
    "dataclass": _attributes(Record),
    "frozen dataclass": _attributes(Frozen),
    "dataclass with fields of its own making": _attributes(Counting),
    "ModelOutput": _keys(lambda x, y: Output(x=x, y=y)),
    "registered": Form(lambda x, y: Registered(x, y, "r"), lambda b: b.x, lambda b: b.y, key="['y']"),
    "registered without names": Form(lambda x, y: Nameless(x, y, "n"), lambda b: b.x, lambda b: b.y, key="[1]"),
    "nested": Form(
        lambda x, y: {"in": Encoding({"a": Record(x, x), "b": [y, (y,)]})},
        lambda b: b["in"]["a"].x,
        lambda b: b["in"]["b"][1][0],
        key="['in']['b'][0]",
    ),
    "arrays": Form(
        lambda x, y: {"x": x.numpy(), "y": y.numpy()},
        lambda b: torch.from_numpy(b["x"]),
        lambda b: torch.from_numpy(b["y"]),
        graph=False,
    ),
    "columns": Form(
        lambda x, y: {
            "x": x,
            "y": y,
            "names": _names(x),
            "sums": [float(n) for n in _names(x)],
        },
        _named_x,
        lambda b: b["y"],
        fills=False,
        key="['y']",
    ),
    "packed": Form(lambda x, y: {"x": packed(x), "y": y}, _packed_x, lambda b: b["y"], graph=False, key="['y']"),
    "packed, sorted": Form(
        lambda x, y: {"x": packed(x, enforce_sorted=True), "y": y},
        _packed_x,
        lambda b: b["y"],
        graph=False,
        sorted=True,
        key="['y']",
    ),
}
if find_spec("transformers") is not None:  # pragma: no cover - not a dependency
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    FORMS["transformers.BatchEncoding"] = _keys(lambda x, y: BatchEncoding({"x": x, "y": y}))
    FORMS["transformers.ModelOutput"] = Form(
        lambda x, y: BaseModelOutput(last_hidden_state=x, attentions=(y,)),
        lambda b: b.last_hidden_state,
        lambda b: b.attentions[0],
    )


def examples_of(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns x (B, T), the longest sequences first, and y (B,)."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.0 + torch.rand(count, T, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([T - i * T // max(count, 1) for i in range(count)], dtype=torch.int64)
    x = x * (torch.arange(T) < lengths.view(-1, 1))
    return x, torch.randint(3, (count,), generator=generator)


def same(a: Any, b: Any) -> bool:
    """Returns whether two batches are of the same types, all the way down, and hold the same values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, PackedSequence):
        orders = a.sorted_indices is None, b.sorted_indices is None
        return orders[0] == orders[1] and len(a.data) == len(b.data) and (
            len(a.data) == 0 or torch.equal(unpacked(a), unpacked(b))
        )  # fmt: skip
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) or isinstance(a, Registered):
        return all(same(v, vars(b)[k]) for k, v in vars(a).items())
    return bool(a == b)
