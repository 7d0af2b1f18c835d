"""Several views of one example: averaged before clipping, at both doors; one example moves the sum by C at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Augmented,
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    PerLayer,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    RandomCrop,
    UnsupportedModelError,
)
from privet.accounting.event import GaussianEvent, PoissonEvent
from privet.learning import views as views_module
from tests.contracts.doors import (
    assert_exact,
    copied,
    distance,
    explicit_sum,
    paper_sum,
    reference,
    relative_error,
    size,
    taken,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*noise_multiplier.*:UserWarning"),
]
B, K, C = 4, 4, 0.3  # B = K on purpose: also the length and the width of a model below are 4


class Tied(nn.Module):
    """A layer that is used twice, and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:  # (rows, 4, 4)
        out: Tensor = self.layer(torch.tanh(self.layer(x + self.places))).sum(1)
        return out


class Words(nn.Module):
    """Word vectors, a recurrent layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(self.table(ids))[0][:, -1])
        return out


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 3))


def pictures() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), (4,)),
    "pictures": (pictures, (1, 4, 4)),
    "attention": (attention, (4, 4)),
    "tied": (Tied, (4, 4)),
    "words": (Words, (4,)),
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def by_hand(model: nn.Module, batch: Any) -> Tensor:
    """Returns the mean loss over the views of each example, a view at a time."""
    return torch.stack([loss(model, (batch[0][:, k], batch[1])) for k in range(batch[0].shape[1])]).mean(0)


def case(name: str, views: int = K, examples: int = B) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    build, shape = NETS[name]
    net = build().double()
    x = torch.randn(examples, views, *shape).double()
    if name == "words":
        x = torch.randint(7, (examples, views, *shape))
    return net, (x, torch.randint(3, (examples,)))


@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_that_of_gradients_averaged_over_views(name: str) -> None:
    net, batch = case(name)
    expected, augmented = reference(net, batch, by_hand, Flat(C)), Augmented(loss, views=K)
    for options in ({}, {"passes": 2, "physical_batch_size": 3}):
        assert_exact(explicit_sum(net, batch, loss=augmented, policy=Flat(C), **options), expected)
    assert_exact(paper_sum(net, batch, loss=augmented, policy=Flat(C)), expected)


@pytest.mark.parametrize(
    "options", [{"physical_batch_size": 3, "padded": True}, {"passes": 2}, {"physical_batch_size": 1}], ids=str
)
def test_however_the_step_is_computed(options: dict[str, Any]) -> None:
    net, batch = case("pictures", views=3)
    found = explicit_sum(net, batch, loss=Augmented(loss, views=3), policy=Flat(C), **options)
    assert_exact(found, reference(net, batch, by_hand, Flat(C)))


def test_other_policies_and_modes_and_a_view_at_a_time() -> None:
    net, batch = case("attention")
    policy = PerLayer(C)
    expected = reference(net, batch, by_hand, policy)
    assert_exact(explicit_sum(net, batch, loss=Augmented(loss, views=K), policy=policy), expected)
    assert_exact(explicit_sum(net, batch, loss=Augmented(loss, views=K, separate=True), policy=policy), expected)
    found = paper_sum(net, batch, loss=Augmented(loss, views=K), policy=policy, grad_sample_mode="hooks")
    assert_exact(found, expected)


@pytest.mark.parametrize("door", [explicit_sum, paper_sum])
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(door: Any) -> None:
    net, (x, y) = case("pictures")
    x[-1] *= 1000.0
    augmented = Augmented(loss, views=K)
    all_of = door(net, (x, y), loss=augmented, policy=Flat(C))
    without = door(net, (x[:-1], y[:-1]), loss=augmented, policy=Flat(C))
    moved = distance(all_of, without)
    assert 0.5 * C < moved <= C * (1 + 1e-9)


def test_views_that_are_clipped_one_by_one_are_found() -> None:
    """The planted bug: each view as an example of its own, and the mean taken after clipping."""
    net, (x, y) = case("pictures")
    one_by_one = explicit_sum(net, (x.flatten(0, 1), y.repeat_interleave(K)), loss=loss, policy=Flat(C))
    after = {name: value / K for name, value in one_by_one.items()}
    assert relative_error(after, reference(net, (x, y), by_hand, Flat(C))) > 0.05


def test_rows_in_the_wrong_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: views repeated as whole batches, so that row b * K + k is of another example."""
    net, batch = case("pictures", views=3)
    monkeypatch.setattr(views_module, "_repeat", lambda leaf, path, times: leaf.repeat(times))
    with pytest.raises(UnsupportedModelError, match="examples are mixed"):
        explicit_sum(net, batch, loss=Augmented(loss, views=3), policy=Flat(C))


class Recorded:
    """A random transform that keeps what it returned."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform, self.shown = transform, Tensor()

    def __call__(self, x: Tensor) -> Tensor:
        self.shown = self.transform(x)
        return self.shown


@pytest.mark.parametrize("passes", [1, 2])
def test_the_views_that_are_summed_are_those_whose_norms_were_taken(passes: int) -> None:
    net, (x, y) = case("pictures")
    for transform in (RandomCrop(2, flip=True), lambda rows: rows + 0.3 * torch.randn_like(rows)):
        drawn = Recorded(transform)
        augmented = Augmented(loss, views=K, transform=drawn)
        found = explicit_sum(net, (x[:, 0], y), loss=augmented, policy=Flat(C), passes=passes)
        shown = drawn.shown.view(B, K, 1, 4, 4)
        assert not torch.equal(shown[:, 0], shown[:, 1])
        assert_exact(found, reference(net, (shown, y), by_hand, Flat(C)))


def data(n: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 4, 4), torch.randint(3, (n,)))


def test_views_cost_nothing_and_count_as_one_participation_at_both_doors() -> None:
    augmented = Augmented(loss, views=3, transform=RandomCrop(1))
    net = pictures()
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(2.0), steps=3),
        loss_per_example=augmented,
    )
    for batch in step.batches(data()):
        step(batch)
    once = PoissonEvent(0.2, GaussianEvent(2.0))
    assert [(phase.event, phase.count) for phase in step.ledger.phases] == [(once, 3)]

    engine, net = PrivacyEngine(), pictures()
    net, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data(), batch_size=8),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    seen = taken(net, optimizer)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for batch in parts:
            optimizer.zero_grad()
            augmented(net, batch).mean().backward()
            optimizer.step()
    assert [(phase.event, phase.count) for phase in engine.ledger.phases] == [(once, 5)]
    assert len(seen) == 5
    assert all(size(each) > 0 for each in seen)


def test_a_batch_of_any_container_is_repeated() -> None:
    seen: list[Any] = []

    def look(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return batch["x"].sum(1)

    batch = {"x": torch.arange(6.0).view(3, 2), "names": ["a", "b", "c"], "ids": torch.arange(3).numpy(), "t": 0.5}
    losses = Augmented(look, views=2, transform=lambda x: -x)(nn.Linear(1, 1), batch)
    assert losses.tolist() == [-1.0, -5.0, -9.0]
    assert seen[0]["names"] == ["a", "a", "b", "b", "c", "c"]
    assert seen[0]["ids"].tolist() == [0, 0, 1, 1, 2, 2]
    assert seen[0]["t"] == 0.5
    whole = Augmented(look, views=2, whole_batch=True, transform=lambda b: {**b, "x": 2 * b["x"]})
    assert whole(nn.Linear(1, 1), batch).tolist() == [2.0, 10.0, 18.0]


def test_what_cannot_be_right_is_refused_in_words() -> None:
    net, (x, y) = nn.Linear(4, 3), (torch.randn(3, 2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ConfigurationError, match=r"views on axis 1, \(3, 4, \.\.\.\)"):
        Augmented(loss, views=4)(net, (x, y))
    with pytest.raises(ConfigurationError, match="transform returned 3 rows for 6"):
        Augmented(loss, views=2, transform=lambda rows: rows[:3])(net, (x[:, 0], y))
    with pytest.raises(ConfigurationError, match=r"returned shape .* for 6 rows"):
        Augmented(lambda m, b: loss(m, b).mean(), views=2)(net, (x, y))
    with pytest.raises(ConfigurationError, match="disagree about the number of examples"):
        Augmented(loss, views=2)(net, (x, y, torch.zeros(5)))
    for views in (0, 1.5):
        with pytest.raises(ConfigurationError, match="views"):
            Augmented(loss, views=views)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="more pixels than the padding"):
        RandomCrop(4)(torch.zeros(2, 1, 4, 4))


def test_an_augmentation_that_mixes_examples_is_refused() -> None:
    mixes = Augmented(loss, views=2, transform=lambda rows: 0.5 * rows + 0.5 * rows.flip(0))
    net, (x, y) = case("linear")
    with pytest.raises(UnsupportedModelError, match="examples are mixed"):
        explicit_sum(net, (x[:, 0], y), loss=mixes, policy=Flat(C))


def test_a_crop_shows_each_picture_shifted_by_a_number_of_its_own() -> None:
    picture = torch.arange(36.0).view(1, 1, 6, 6)
    shown = RandomCrop(1, flip=True)(picture.expand(400, -1, -1, -1))
    padded = F.pad(picture, (1, 1, 1, 1), mode="reflect")
    cuts = [padded[0, 0, i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    allowed = [*cuts, *(cut.flip(1) for cut in cuts)]
    counts = [sum(torch.equal(row[0], each) for row in shown) for each in allowed]
    assert sum(counts) == 400
    assert min(counts) > 0
    assert torch.equal(RandomCrop(0)(picture), picture)
    assert RandomCrop(1)(picture[:0]).shape == (0, 1, 6, 6)


def test_every_way_through_the_papers_door_takes_the_same_steps() -> None:
    x, y = torch.randn(16, 3, 1, 4, 4).double(), torch.randint(3, (16,))
    augmented, base, found = Augmented(loss, views=3), pictures().double(), []
    ways: tuple[tuple[int, dict[str, Any]], ...] = (
        (1, {}),
        (1, {"grad_sample_mode": "hooks"}),
        (2, {"accumulate": 2}),
    )
    for parts, options in ways:
        net, optimizer, batches = PrivacyEngine(accountant="rdp").make_private(
            module=(net := copied(base)),
            optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=8 // parts),
            noise_multiplier=0.0,
            max_grad_norm=C,
            poisson_sampling=False,
            **options,
        )
        for number, batch in enumerate(batches):
            (augmented(net, batch).mean() / parts).backward()
            if number % parts == parts - 1:
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.detach() for p in net.parameters()])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found[0], other, strict=True))
    assert not torch.allclose(found[0][0], next(base.parameters()), atol=1e-3)
