"""Packed sequences: whose each row is follows from the sort and the packing, and nothing is guessed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
)
from torch.utils.checkpoint import checkpoint

from privet.clipping import PSAC, Automatic, Flat, PerLayer
from privet.errors import CoverageError, PrivetError, UnsupportedModelError
from privet.gradients.capture import anew, packing
from privet.gradients.capture.moved import MovedRows
from privet.gradients.capture.routing import Routed
from tests.contracts.doors import DOORS, door_sum, explicit_sum, paper_sum, reference, size

B, T, F = 6, 5, 3
LENGTHS = torch.tensor([3, 5, 1, 4, 5, 2])

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def batch_of(lengths: Tensor = LENGTHS, steps: int = T, features: int = F) -> tuple[Tensor, Tensor]:
    return torch.randn(len(lengths), steps, features, dtype=torch.float64), lengths


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Returns (B,): every output of every step counts, with a weight of its own."""
    outputs = model(*batch)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The same for the first steps, however many there are.
    weights = [1 + 0.1 * torch.arange(o.shape[1:].numel(), dtype=o.dtype).view(o.shape[1:]) for o in outputs]
    total: Tensor = sum((o.square() * w).flatten(1).sum(1) for o, w in zip(outputs, weights, strict=True))  # type: ignore[assignment]
    return total


# -- models ------------------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """The last states of a recurrent layer, without a first state."""

    def __init__(self, layer: nn.RNNBase | None = None) -> None:
        super().__init__()
        self.layer = nn.LSTM(F, 4) if layer is None else layer
        self.head = nn.Linear(self.layer.hidden_size, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        last = self.layer(packed)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class Whole(nn.Module):
    """All outputs, from first states of the data, through two layers, both directions and a projection."""

    def __init__(self, *, batch_first: bool = True, enforce_sorted: bool = False) -> None:
        super().__init__()
        self.layer = nn.LSTM(F, 4, 2, bidirectional=True, proj_size=2)
        self.first, self.memory, self.head = nn.Linear(F, 8), nn.Linear(F, 16), nn.Linear(4, 2)
        self.pack = {"batch_first": batch_first, "enforce_sorted": enforce_sorted}

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        states = [layer(x[:, 0]).view(len(x), 4, -1).transpose(0, 1) for layer in (self.first, self.memory)]
        batch_first = self.pack["batch_first"]
        packed = pack_padded_sequence(x if batch_first else x.transpose(0, 1), lengths, **self.pack)
        found, (h, c) = self.layer(packed, tuple(states))
        rows, _ = pad_packed_sequence(found, batch_first=batch_first, total_length=x.shape[1])
        rows = rows if batch_first else rows.transpose(0, 1)
        return self.head(rows), h.transpose(0, 1), c.transpose(0, 1)


class OnData(nn.Module):
    """Embeddings that are packed, maps of the packed data before and after, and outputs as long as the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.before, self.layer = nn.Embedding(7, F), nn.Linear(F, F), nn.GRU(F, 4, bidirectional=True)
        self.norm, self.slope, self.head = nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        ids = (3 * x[..., 0].abs()).long().clamp(max=6)
        packed = pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        packed = PackedSequence(torch.relu(self.before(packed.data) + 0.1), *packed[1:])
        states = self.layer(packed)[0]
        rows = self.slope(self.head(torch.cat([self.norm(states.data)], -1)))
        return pad_packed_sequence(PackedSequence(rows, *states[1:]), batch_first=True)[0]


class ByHand(nn.Module):
    """Sorted and put back by the model itself, as code was written before torch did it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(7, F), nn.GRU(F, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        ids = (3 * x[..., 0].abs()).long().clamp(max=6)
        lengths, order = lengths.sort(descending=True)
        last = self.layer(pack_padded_sequence(self.table(ids[order]), lengths, batch_first=True))[1]
        return self.head(last.squeeze(0))[order.argsort()]


class Pooled(nn.Module):
    """Attention over the states, and the state of the last step by its place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.score, self.head = nn.RNN(F, 4, 2, batch_first=True), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, counts = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        held = torch.arange(states.shape[1]) < counts.unsqueeze(1)
        weights = self.score(states).squeeze(2).masked_fill(~held, -1e9).softmax(1)
        return self.head((weights.unsqueeze(2) * states).sum(1) + states[torch.arange(len(x)), counts - 1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "all outputs": Whole,
    "batch on axis 1": lambda: Whole(batch_first=False),
    "maps of packed data": OnData,
    "sorted by hand": ByHand,
    "pooled": Pooled,
}


def assert_exact(door: str, module: nn.Module, *batches: Any, **options: Any) -> None:
    """Asserts that a door's sum of the last batch is that of one example at a time."""
    policy = options.pop("policy", Flat(1.0))
    expected = reference(module, batches[-1], loss, policy)
    act = paper_sum if door == "paper" else explicit_sum
    found = act(module, *batches, loss=loss, policy=policy, **options)
    assert expected.terms > 0.1
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-11 * expected.terms, name


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("door", DOORS)
def test_both_doors_take_one_example_at_a_time(door: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anew.Anew, "run", lambda *_: pytest.fail("whose the rows are was not known"))
    other = batch_of(torch.tensor([4, 1, 2, 4]), steps=4)  # of other lengths, and fewer
    assert_exact(door, MODELS[name]().double(), batch_of(), other)


@pytest.mark.parametrize("door", DOORS)
def test_sorted_sequences_are_taken_as_they_lie(door: str) -> None:
    assert_exact(door, Whole(enforce_sorted=True).double(), batch_of(LENGTHS.sort(descending=True).values))


@pytest.mark.parametrize("policy", [PerLayer(1.0), Automatic(1.0), PSAC(1.0)], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("options", [{}, {"grad_sample_mode": "hooks"}, {"grad_sample_mode": "functorch"}], ids=str)
def test_every_mode_takes_them(options: dict[str, Any], policy: Any) -> None:
    assert_exact("paper", OnData().double(), batch_of(), policy=policy, **options)


def test_two_passes_and_physical_batches_take_them() -> None:
    assert_exact("explicit", Whole().double(), batch_of(), passes=2)
    assert_exact("explicit", Whole().double(), batch_of(), physical_batch_size=4)


@pytest.mark.parametrize("door", DOORS)
def test_sizes_that_coincide_do_not_mislead(door: str) -> None:
    full = batch_of(torch.full((4,), 4), steps=4, features=4)  # B = T = F = H, and N = B T
    assert_exact(door, Last(nn.LSTM(4, 4)).double(), full, batch_of(torch.tensor([1, 4, 2, 1]), steps=4, features=4))
    as_many = batch_of(torch.tensor([1, 2, 1]), steps=2, features=4)  # N = F = H
    assert_exact(door, Last(nn.GRU(4, 4)).double(), as_many, as_many)


@pytest.mark.parametrize("door", DOORS)
def test_packing_a_list_inside_of_the_model_is_exact(door: str) -> None:
    class Listed(Last):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_sequence([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)], enforce_sorted=False)
            return self.head(self.layer(packed)[1][0][-1])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows were moved along the batch")
        assert_exact(door, Listed().double(), batch_of())


def test_the_same_entries_are_dropped_between_layers_as_by_the_plain_module() -> None:
    module = nn.LSTM(F, 4, 3, dropout=0.5, bidirectional=True).double()
    seen: list[Tensor] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            torch.manual_seed(11)
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states = self.layer(packed)[0]
            seen.append(states.data.detach())
            return pad_packed_sequence(states, batch_first=True)[0]

    batch = batch_of()
    door_sum("explicit", Net(), batch, loss=loss)
    Net()(*batch)
    assert torch.allclose(seen[-1], seen[-2], rtol=1e-12, atol=1e-12)


# -- bounded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(door: str) -> None:
    module, (x, lengths) = Whole().double(), batch_of()
    without = door_sum(door, module, (x[:-1], lengths[:-1]), loss=loss)
    for changed in (x, torch.cat([x[:-1], 1000 * x[-1:]])):
        more = door_sum(door, module, (changed, lengths), loss=loss)
        assert 0.9 < size({name: more[name] - without[name] for name in more}) <= 1.0 + 1e-9


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_batch_is_a_step_of_nothing(door: str) -> None:
    x, lengths = batch_of()
    empty = (x[:0], lengths[:0])
    for batches in ([(x, lengths), empty], [empty]):
        assert all(not value.any() for value in door_sum(door, Last().double(), *batches, loss=loss).values())
    assert_exact(door, Last().double(), empty, (x, lengths))


# -- found and refused -------------------------------------------------------------------------------------------------


def _in_sorted_order(order: Routed, sizes: tuple[int, ...]) -> Routed:
    return _PACKED(Routed(torch.arange(order.rows), origin=order.origin), sizes)


_PACKED = packing.packed
PLANTED: dict[str, tuple[Any, str, Any]] = {
    "the sort is forgotten": (packing, "packed", _in_sorted_order),
    "last states are taken to be in order": (Routed, "on_axis", lambda self, axis: Routed(self.owner, by_place=True)),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("door", DOORS)
def test_wrong_owners_are_found_by_the_check(door: str, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[planted])
    with pytest.raises(PrivetError) as caught:
        door_sum(door, ByHand().double(), batch_of(), loss=loss)
    assert isinstance(caught.value, CoverageError) or "examples are mixed" in str(caught.value)


class Turned(Last):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.layer(PackedSequence(packed.data.flip(0), *packed[1:]))[1][0][-1])


class Unsorted(Last):
    def __init__(self) -> None:
        super().__init__(nn.GRU(F, 4))
        self.first = nn.Linear(F, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.layer(PackedSequence(*packed[:2]), self.first(x[:, 0]).unsqueeze(0))[1][-1])


class OtherSizes(Last):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        sizes = torch.cat([packed.batch_sizes[:1], packed.batch_sizes.new_tensor([len(packed.data) - len(x)])])
        return self.head(self.layer(PackedSequence(packed.data, sizes.clamp(max=len(x))))[1][0][-1])


class Recomputed(Last):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return checkpoint(super().forward, x, lengths, use_reentrant=False)


class Mixing(Last):
    """Examples meet, beside dropout whose entries depend on other lengths."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(F, 4, 2, dropout=0.3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) if self.training else x, lengths)


class MixingLengths(Mixing):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return Last.forward(self, x * lengths.double().mean(), lengths)


class MixingLengthsInTraining(Mixing):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return Last.forward(self, x * lengths.double().mean() if self.training else x, lengths)


REFUSED = {
    "a checkpoint": (Recomputed, "activation checkpoint.*leave recurrent layers out"),
    "mixed in training, with dropout": (Mixing, "examples are mixed"),
    "mixed by lengths, with dropout": (MixingLengths, "examples are mixed"),
    "mixed by lengths in training, with dropout": (MixingLengthsInTraining, "examples are mixed"),
    "rows turned around": (Turned, "packed sequence.*pack in the forward"),
    "the order dropped": (Unsorted, "first states in another order.*Keep sorted_indices"),
    "sizes of another one": (OtherSizes, "batch_sizes of another one"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_rows_that_are_nobodys_for_sure_are_refused_with_the_way_on(door: str, what: str) -> None:
    module, words = REFUSED[what]
    batch = batch_of(torch.tensor([1, 3, 1, 1]), steps=3)
    with pytest.raises(UnsupportedModelError, match=f"(?s){words}"):
        door_sum(door, module().double(), batch, loss=loss)


def test_a_compiled_step_says_that_lengths_cannot_be_in_a_graph() -> None:
    with pytest.raises(UnsupportedModelError, match=r"packs sequences.*compile=False"):
        explicit_sum(Last().double(), batch_of(), loss=loss, policy=Flat(1.0), compile=True)


def test_sequences_that_are_padded_by_the_loader_are_packed_in_the_forward() -> None:
    sequences = [torch.randn(n, F, dtype=torch.float64) for n in LENGTHS.tolist()]
    batch = (pad_sequence(sequences, batch_first=True), torch.tensor([len(s) for s in sequences]))
    packed = pack_padded_sequence(*batch, batch_first=True, enforce_sorted=False)
    assert all(map(torch.equal, unpack_sequence(packed), sequences))
    assert_exact("paper", Last().double(), batch)


@pytest.mark.parametrize("how", ["a tag", "a function that nobody follows"])
def test_rows_that_are_written_in_place_are_forgotten(how: str) -> None:
    moved, rows = MovedRows(lambda _: False, ()), torch.zeros(3, 2)
    other = rows.clone()
    for t in (rows, other):
        moved.owned.put(t, Routed(torch.tensor([2, 0, 1]), packing=None))
    if how == "a tag":
        moved._tag(rows, how)
    else:
        moved.owned.forget_written([rows], [other, rows])
    assert moved.owned.of(rows) is None
    assert moved.owned.of(other) is not None
