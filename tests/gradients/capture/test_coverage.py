"""The check on the first batch: what it refuses, what it lets through, and what it leaves as it was."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import CoverageError, Flat, UnsupportedModelError
from privet.gradients.capture.undisturbed import undisturbed
from tests.contracts.doors import DOORS, assert_exact, door_sum, paper_sum, reference
from tests.contracts.zoo import Answer, D, T, batch_of, sequences, squares, tokens, vectors


def loss_of(m: nn.Module, b: Any) -> Tensor:
    output = m(*b)
    return squares(output.logits if isinstance(output, Answer) else output)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(D, D), nn.Linear(D, 2)


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.last(h - h.mean(0))


class CentredDetached(Net):
    """Mixes where no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.last(h - h.mean(0).detach())


class CentredInside(Net):
    def forward(self, x: Tensor) -> Answer:
        h = self.layer(x)
        return Answer(self.last(h - h.mean(0)))


class Neighbours(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x).roll(1, 0))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return g @ weight.t(), x.t() @ g


class Custom(Net):
    """A use that no torch function shows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Hidden.apply(x, self.layer.weight))


class PlaceInTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Parameter(torch.randn(4, D)), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.places[: len(x)])


class Scalars(Net):
    """Turns the batch into one number on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)) * self.layer(x).mean()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "kind",
    [Centred, CentredDetached, CentredInside, Neighbours, Custom, PlaceInTheBatch, Scalars],
    ids=lambda k: k.__name__,
)
def test_a_model_whose_examples_cannot_be_told_apart_is_refused(kind: type[nn.Module], door: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, kind().double(), batch_of("linear", 4), loss=loss_of)


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_of_one_first_does_not_hide_the_mixing_of_the_next(door: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, Centred().double(), batch_of("linear", 1), batch_of("linear", 4), loss=loss_of)


@pytest.mark.parametrize("door", DOORS)
def test_a_first_batch_that_is_not_finite_does_not_hide_what_is_wrong(door: str) -> None:
    torch.manual_seed(0)
    bad = batch_of("linear", 4)[0].index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, Neighbours().double(), (bad,), batch_of("linear", 4), loss=loss_of)


def test_two_inputs_with_different_batch_axes_are_refused() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last(self.layer(x) + self.layer(y.t()))

    x = torch.randn(4, D, dtype=torch.float64)
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum("paper", Two().double(), (x, x.t().contiguous()), loss=lambda m, b: squares(m(*b)))


@pytest.mark.parametrize("positions", [1, 3, 4])
def test_batch_second_is_the_same_model_turned(positions: int) -> None:
    torch.manual_seed(0)

    class Attend(nn.Module):
        """Mixes positions, as it may."""

        def __init__(self, *, batch_first: bool) -> None:
            super().__init__()
            self.layer, self.batch_first = nn.Linear(D, D), batch_first

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return torch.tanh(h - h.mean(1 if self.batch_first else 0, keepdim=True) + h)

    first = Attend(batch_first=True).double()
    second = Attend(batch_first=False).double()
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, positions, D, dtype=torch.float64)
    expected = reference(first, (x,), lambda m, b: squares(m(*b)), Flat(0.5))
    found = paper_sum(
        second,
        (x.transpose(0, 1).contiguous(),),
        loss=lambda m, b: squares(m(*b).transpose(0, 1)),
        policy=Flat(0.5),
        batch_first=False,
    )
    assert_exact(found, expected)


def test_a_site_first_met_on_a_later_batch_is_looked_at() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer, self.on = nn.Embedding(T, D), nn.Linear(D, 2), False

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.table(torch.arange(x.shape[1])) if self.on else x)

    def loss(m: nn.Module, b: Any) -> Tensor:
        m.on = len(b) == 2
        return squares(m(b[0]))

    x = torch.randn(T, T, D)  # as many positions as examples
    net = Later()
    for door in DOORS:
        found = door_sum(door, net, (x,), (x, x), loss=loss)
        assert_exact(found, reference(net, (x, x), loss, Flat(1.0)))


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_layers_that_are_dropped_at_random_are_traced_alike(source: str) -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            draw = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": np.random.rand}[source]()
            for _ in range(int(draw * 5) + 1):
                x = torch.tanh(self.layer(x))
            return self.last(x)

    batch = batch_of("linear", 4)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002 - what users seed
    model = Dropping().double()
    door_sum("paper", model, batch, loss=loss_of)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002 - what users seed
    with undisturbed(model) as restore:
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002 - what users seed
        restore()
        assert random.getstate() == state[0]
        torch.rand(3)
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]  # noqa: NPY002 - what users seed
    assert torch.equal(torch.get_rng_state(), state[2])


def test_dropout_is_seen_with_the_same_masks_by_both_sides_of_the_check() -> None:
    model = nn.Sequential(nn.Linear(D, 50), nn.Dropout(0.5), nn.Linear(50, 2), nn.Dropout(0.5)).double()
    door_sum("paper", model, batch_of("linear", 6), loss=loss_of)


def test_a_layer_skipped_this_time_has_a_sum_of_zero_and_no_stale_norm() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.on = nn.Linear(D, D), nn.Linear(D, D), True

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))) if self.on else self.first(x)

    def loss(m: nn.Module, b: Any) -> Tensor:
        m.on = len(b) == 1
        return squares(m(b[0]))

    model, (x,) = Skips().double(), batch_of("linear", 4)
    expected = reference(model, (x, x), loss, Flat(0.5))
    for door in DOORS:
        found = door_sum(door, model, (x,), (x, x), loss=loss, policy=Flat(0.5))
        assert_exact(found, expected)
        assert not found["second.weight"].any()


@pytest.mark.parametrize(
    ("kind", "batch", "word"),
    [
        (lambda: nn.Embedding(7, D, max_norm=1.0), tokens, "max_norm"),
        (lambda: nn.Embedding(7, D, scale_grad_by_freq=True), tokens, "scale_grad_by_freq"),
        (lambda: nn.Embedding(7, D, sparse=True), tokens, "sparse"),
        (lambda: nn.BatchNorm1d(D), vectors, "BatchNorm"),
        (lambda: nn.BatchNorm1d(D, affine=False), vectors, "BatchNorm"),
        (lambda: nn.BatchNorm1d(D).requires_grad_(False), vectors, "BatchNorm"),
        (lambda: nn.InstanceNorm1d(T, track_running_stats=True), sequences, "InstanceNorm"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("door", DOORS)
def test_options_that_leak_are_refused_with_the_reason(kind: Any, batch: Any, word: str, door: str) -> None:
    model = nn.Sequential(kind(), nn.Linear(D, 2))
    rows = tuple(t.float() if t.is_floating_point() else t for t in batch(4, torch.Generator()))
    with pytest.raises(UnsupportedModelError, match=word):
        door_sum(door, model, rows, loss=loss_of)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("door", DOORS)
def test_bags_of_repeated_indices_are_exact_or_refused(mode: str, door: str) -> None:
    torch.manual_seed(0)
    model = nn.EmbeddingBag(7, D, mode=mode).double()
    rows = (torch.tensor([[1, 1, 1, 2], [3, 3, 0, 0], [5, 5, 5, 5]]),)
    try:
        found = door_sum(door, model, rows, loss=loss_of, policy=Flat(0.5))
    except UnsupportedModelError:
        return
    assert_exact(found, reference(model, rows, loss_of, Flat(0.5)))


@pytest.mark.parametrize("door", DOORS)
def test_a_bag_with_weights_is_exact_or_refused(door: str) -> None:
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, D))

        def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
            return F.embedding_bag(ids, self.table, mode="sum", per_sample_weights=weights)

    model = Bag().double()
    rows = (torch.tensor([[1, 1, 2], [3, 3, 0]]), torch.randn(2, 3, dtype=torch.float64))
    try:
        found = door_sum(door, model, rows, loss=loss_of, policy=Flat(0.5))
    except UnsupportedModelError:
        return
    assert_exact(found, reference(model, rows, loss_of, Flat(0.5)))


class Registered(dict[str, Tensor]):
    """An output class that its library told torch how to take apart, without names for the parts."""


torch.utils._pytree.register_pytree_node(
    Registered, lambda r: (list(r.values()), list(r)), lambda values, keys: Registered(zip(keys, values, strict=True))
)


def test_outputs_of_a_class_registered_without_names_are_looked_into() -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Registered:
            return Registered(logits=self.last(self.layer(x)))

    class Mixed(Net):
        def forward(self, x: Tensor) -> Registered:
            h = self.layer(x)
            return Registered(logits=self.last(h + h.mean(0).detach()))

    def loss(m: nn.Module, b: Any) -> Tensor:
        return squares(m(*b)["logits"])

    model, batch = Plain().double(), batch_of("linear", 4)
    found = paper_sum(model, batch, batch_of("linear", 0), batch, loss=loss, policy=Flat(0.5))
    assert_exact(found, reference(model, batch, loss, Flat(0.5)))
    with pytest.raises((CoverageError, UnsupportedModelError)):
        paper_sum(Mixed().double(), batch, loss=loss, policy=Flat(0.5))


class Watching(Net):
    """Notes, in its class for doors copy modules, how many examples each forward has that a gradient may follow."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least = least
        self.sizes.clear()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.sizes.append(len(x))
        if len(x) < self.least:
            raise ValueError("too few")
        return self.last(torch.relu(self.layer(x)))


@pytest.mark.parametrize("door", DOORS)
def test_the_check_of_a_large_batch_looks_at_its_first_examples_alone(door: str) -> None:
    net, batch = Watching().double(), batch_of("linear", 40)
    found = door_sum(door, net, batch, loss=loss_of)
    assert set(net.sizes[:-1]) == {16, 17, 8, 9}, "the probe looks at 8"
    assert net.sizes[-1] == 40
    assert_exact(found, reference(net, batch, loss_of, Flat(1.0)))


@pytest.mark.parametrize("door", DOORS)
def test_a_model_that_wants_all_of_the_batch_is_checked_on_all_of_it(door: str) -> None:
    net, batch = Watching(least=20).double(), batch_of("linear", 40)
    found = door_sum(door, net, batch, loss=loss_of)
    net.least = 0
    assert 41 in net.sizes
    assert_exact(found, reference(net, batch, loss_of, Flat(1.0)))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [Centred, Neighbours, Custom], ids=lambda k: k.__name__)
def test_a_large_batch_hides_nothing(kind: type[nn.Module], door: str) -> None:
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, kind().double(), batch_of("linear", 40), loss=loss_of)
