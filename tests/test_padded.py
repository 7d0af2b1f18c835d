"""padded=True: physical batches of one size, and rows that fill up change no sum, noise, count or loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Performance, Poisson, PrivateStep
from privet.clipping import PerLayer
from privet.gradients.passes import one_pass
from privet.sampling import Partition
from tests.contracts.doors import assert_exact, distance, reference, size, taken
from tests.contracts.zoo import ZOO, batch_of, model_of, plain
from tests.gradients.policies import POLICIES

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
SIZES = (1, 3, 7, 8, 20)


class Net(nn.Module):
    """Remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.layers(x)


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def step_of(net: nn.Module, *, loss: Any = entropy, policy: Any = None, noise: float = 0.0, **options: Any):
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=policy or Flat(0.3), noise=Gaussian(noise)),
        loss_per_example=loss,
        expected_batch_size=1,
        noise_generator=torch.Generator().manual_seed(3),
        performance=Performance(**options),
    )
    return step, taken(net, step.optimizer)


def batch_of_eight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return 3.0 * torch.randn(8, 5, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def net_of(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("physical", SIZES)
@pytest.mark.parametrize("policy", POLICIES)
def test_splitting_and_padding_change_no_sum_and_no_loss(policy, physical, padded):
    net, batch = net_of(), batch_of_eight()
    bound = POLICIES[policy](net, 0.3)
    expected = reference(net_of(), batch, entropy, bound)
    for passes in (1, 2) if len(set(bound.groups(list(dict(net.named_parameters()))))) == 1 else (1,):
        step, seen = step_of(net_of(), policy=bound, physical_batch_size=physical, padded=padded, passes=passes)
        losses = step(batch)
        assert_exact(seen[-1], expected)
        assert torch.allclose(losses, entropy(net, batch))


@pytest.mark.parametrize("passes", [1, 2])
def test_the_model_sees_one_size_and_no_other(passes):
    net = net_of()
    step, _ = step_of(net, physical_batch_size=3, padded=True, passes=passes)
    x, y = batch_of_eight()
    step((x, y))
    net.rows.clear()
    for n in (8, 1, 0, 3, 5):
        assert len(step((x[:n], y[:n]))) == n
    assert net.rows == [3] * (3 + 1 + 0 + 1 + 2)


def test_noise_is_bit_equal_padded_split_or_neither():
    class Zero(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    noise = []
    ways: list[dict[str, Any]] = [{}, *({"physical_batch_size": n, "padded": p} for n in SIZES for p in (False, True))]
    for options in ways:
        step, seen = step_of(net_of(Zero), noise=1.5, **options)
        for n in (8, 0, 5):
            step(tuple(t[:n] for t in batch_of_eight()))
        noise.append(torch.cat([g.flatten() for grads in seen for g in grads.values()]))
    assert noise[0].abs().min() > 0
    assert all(torch.equal(found, noise[0]) for found in noise)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_use_a_parameter_can_be_padded(name, passes):
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    step, seen = step_of(plain(model), loss=loss, physical_batch_size=4, padded=True, passes=passes)
    step(batch)
    assert_exact(seen[-1], reference(plain(model), batch, loss, Flat(0.3)))


def by_the_sum(module: nn.Module, batch: Any) -> Tensor:
    """Is NaN, and has gradients that are, on a row of zeros."""
    return (module(batch[0] / batch[0].sum(1, keepdim=True)) - 1.0).square().sum(1)


@pytest.mark.parametrize("passes", [1, 2])
def test_rows_that_fill_up_may_be_nan_and_are_not_counted(passes):
    batch = batch_of_eight()
    x = batch[0].index_fill(0, torch.tensor([4]), math.nan)
    assert bool(by_the_sum(net_of(), (torch.zeros(1, 5).double(),)).isnan())
    step, _ = step_of(net_of(), loss=by_the_sum, physical_batch_size=5, padded=True, passes=passes)
    losses, clipped = step._summed((x,), 8)
    rest = (torch.cat([x[:4], x[5:]]),)
    assert int(clipped.statistics["dropped"]) == 1
    assert clipped.statistics["norms"].shape == (1, 8)
    assert losses.isnan().sum() == 1
    assert_exact(dict(clipped.take()), reference(net_of(), rest, by_the_sum, Flat(0.3)))


def test_these_tests_would_see_a_mask_that_is_not_used(monkeypatch):
    """The last row is data, so that what fills up would be told from nothing."""
    whole = one_pass.spread_sum
    monkeypatch.setattr(one_pass, "spread_sum", lambda *a, absent, **k: whole(*a, absent=None, **k))
    step, seen = step_of(net_of(), physical_batch_size=5, padded=True)
    step(batch_of_eight())
    expected = reference(net_of(), batch_of_eight(), entropy, Flat(0.3))
    assert distance(seen[-1], expected) > 1e-3 * size(expected)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_one_example_more_moves_a_padded_sum_by_at_most_the_sensitivity(scale):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return entropy(module, batch) * scale

    policy = PerLayer(0.5)
    for physical in (3, 8):
        step, _ = step_of(net_of(), loss=loss, policy=policy, physical_batch_size=physical, padded=True)
        whole, less = (dict(step._summed(tuple(t[:n] for t in batch_of_eight()), n)[1].take()) for n in (8, 7))
        assert distance(whole, less) <= 0.5 * (1 + 1e-9)


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"padded": True, "physical_batch_size": "auto"}, "keeps it fixed"),
        ({"padded": True, "physical_batch_size": 0}, "physical_batch_size"),
        ({"compile": True, "physical_batch_size": "auto"}, "keeps it fixed"),
        ({"compile": True, "passes": 2}, "passes=2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, match):
    net = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match=match):
        step_of(net, **options)
    assert not net.weight._post_accumulate_grad_hooks


def test_without_a_size_it_follows_from_public_numbers():
    for sampling, expected in ((Poisson(0.1), 120), (Partition(), 100)):
        net = nn.Linear(2, 1)
        step = PrivateStep(
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
            mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(1.0)),
            loss_per_example=lambda m, b: m(b[0]).sum(1),
            expected_batch_size=100,
            performance=Performance(padded=True),
        )
        assert step._size.most == expected
