"""Later parts, simulated in a few lines each: sharding, users, noise with memory, rules and policies of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError, Flat, Gaussian, Mechanism, Poisson, register_rule
from privet.accounting.event import GaussianEvent
from privet.accounting.ledger import Ledger
from privet.clipping import ClippingPolicy, PerLayer
from privet.errors import ProtocolError
from privet.gradients.reference import example_gradients
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Owner
from privet.noise import GaussianNoise, NoiseKey, noise_for
from privet.noise.gaussian import PrivateGradient
from privet.training.update import PrivateUpdate
from tests.contracts.doors import assert_exact, door_sum, expected_sum, reference, size
from tests.contracts.zoo import ZOO, D, batch_of, model_of, plain, squares
from tests.gradients.harness import recorded_of, trainable

# -- a model that is split over ranks ----------------------------------------------------------------------------------


class FakeRanks:
    """Two ranks in one process: the first pass leaves each rank's norms here, the second finds their sum."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def sum(self, squared_norms: Tensor) -> Tensor:
        self.norms.append(squared_norms.clone())
        return torch.stack(self.norms[:2]).sum(0)


class Streamed:
    """Hands each parameter's sum on, and holds none."""

    def __init__(self, send: Callable[[str, Tensor], None]) -> None:
        self.put = send

    def values(self) -> Mapping[str, Tensor]:
        return {}


@pytest.mark.parametrize("name", ["linear", "convolution", "tied weights", "elementwise", "attention"])
def test_a_model_split_over_two_ranks_has_the_same_sum(name: str) -> None:
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    recorded = recorded_of(model, batch, loss)
    parameters = trainable(model)
    names = list(parameters)
    ranks = [dict.fromkeys(names[::2]), dict.fromkeys(names[1::2])]
    reducer = FakeRanks()
    for _ in range(2):  # what two processes do at once: norms first, then sums of what each holds
        arrived: dict[str, Tensor] = {}
        for rank in ranks:
            mine = {n: parameters[n] for n in rank}
            sink = Streamed(arrived.__setitem__)
            total = clipped_sum(recorded, mine, Flat(0.5), reducer=reducer, sink=sink)
            assert total.values == {}
            assert total.sensitivity == 0.5
    assert_exact(arrived, reference(model, batch, loss, Flat(0.5)))


@pytest.mark.parametrize("split", ["everything on the second", "one layer over both"])
def test_ranks_share_the_groups_of_the_whole_model_and_one_may_hold_nothing(split: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(5, D, dtype=torch.float64),)

    def loss(m: nn.Module, b: Any) -> Tensor:
        return squares(m(b[0]))

    recorded, parameters, policy = recorded_of(model, batch, loss), trainable(model), PerLayer(0.3)
    names = list(parameters)
    ranks = {"everything on the second": ([], names), "one layer over both": (names[:3], names[3:])}[split]
    reducer, arrived = FakeRanks(), dict[str, Tensor]()
    for _ in range(2):
        for rank in ranks:
            mine = {n: parameters[n] for n in rank}
            sink = Streamed(arrived.__setitem__)
            total = clipped_sum(recorded, mine, policy, reducer=reducer, sink=sink, names=names)
            assert total.sensitivity == 0.3
    assert [n.shape for n in reducer.norms] == [(2, 5)] * 4, "two layers on every rank"
    assert_exact(arrived, reference(model, batch, loss, policy))


# -- users with several examples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["linear", "embedding", "convolution", "tied weights", "merged axes", "sequence first inside", "elementwise"],
)
def test_rows_of_one_user_are_clipped_together(name: str) -> None:
    model, batch, loss = model_of(name), batch_of(name, 7), ZOO[name].loss
    owners = torch.tensor([0, 2, 0, 1, 2, 2, 0])
    recorded = recorded_of(model, batch, loss)
    found = clipped_sum(recorded, trainable(model), Flat(0.5), owner=Owner(4, owners))  # user 3 has no row
    rows = example_gradients(
        plain(model), [tuple(t[i : i + 1] for t in batch) for i in range(7)], lambda m, b: loss(m, b).sum()
    )
    users = {n: torch.zeros(4, *g.shape[1:], dtype=g.dtype).index_add_(0, owners, g) for n, g in rows.items()}
    assert_exact(dict(found.values), expected_sum(users, Flat(0.5)))
    separate = clipped_sum(recorded_of(model, batch, loss), trainable(model), Flat(0.5))
    assert size({n: separate.values[n] - t for n, t in found.values.items()}) > 1e-3, "the owner makes a difference"


# -- noise with memory over steps --------------------------------------------------------------------------------------


class Correlated:
    """Adds z_t - λ z_{t-1}: part of the noise of the step before is taken back."""

    def __init__(self, inner: GaussianNoise, recall: float) -> None:
        self.inner, self.recall = inner, recall
        self.last: dict[str, Tensor] = {}

    def release(
        self, clipped: Any, *, multiplier: float, step: int, offsets: Mapping[str, int] | None = None
    ) -> PrivateGradient:
        raw = {n: t.clone() for n, t in clipped.values.items()}
        released = self.inner.release(clipped, multiplier=multiplier, step=step, offsets=offsets)
        noise = {n: t - raw[n] for n, t in released.values.items()}
        for n, t in released.values.items():
            t.sub_(self.last.get(n, torch.zeros_like(t)), alpha=self.recall)
        self.last = noise
        return released

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.last = dict(state["last"])


def test_a_noise_with_memory_is_one_more_object() -> None:
    recall, model = 0.8, nn.Linear(40, 50, bias=False)
    noise = Correlated(GaussianNoise(noise_for("cpu", secure_mode=False, key=NoiseKey.fresh())), recall)
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=Flat(2.0), noise=Gaussian(1.5))
    update = PrivateUpdate(
        trainable(model), mechanism=mechanism, noise=noise, ledger=Ledger(accountant="rdp"), divisor=1.0
    )
    seen = []
    for _ in range(3):
        batch = (torch.zeros(0, 40),)
        update.receive(
            clipped_sum(recorded_of(model, batch, lambda m, b: squares(m(*b))), trainable(model), Flat(2.0)), examples=0
        )
        if not seen:
            with pytest.warns(UserWarning, match="did not come"):
                update.release()
        else:
            update.release()
        seen.append(model.weight.grad)
    std = 1.5 * 2.0
    assert float(seen[0].std()) == pytest.approx(std, rel=0.1)
    assert float(seen[1].std()) == pytest.approx(std * (1 + recall**2) ** 0.5, rel=0.1)
    correlation = float((seen[1] * seen[2]).mean()) / std**2
    assert correlation == pytest.approx(-recall, abs=0.15)
    assert update.ledger.phases[0].event == GaussianEvent(1.5)


# -- a policy of one's own ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalised(ClippingPolicy):
    """Every gradient is scaled to just below the clip norm: C / (norm + γ)."""

    clip_norm: float
    stability: float = 0.01

    @property
    def sensitivity(self) -> float:
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        return [0] * len(names)

    def weights(self, squared_norms: Tensor) -> Tensor:
        return self.clip_norm / (squared_norms.sqrt() + self.stability)


@pytest.mark.parametrize("door", ["paper", "explicit"])
def test_a_policy_of_ones_own_is_one_small_class(door: str) -> None:
    model, batch, loss = model_of("linear"), batch_of("linear", 5), ZOO["linear"].loss
    expected = reference(model, batch, loss, Normalised(0.5))
    assert_exact(door_sum(door, model, batch, loss=loss, policy=Normalised(0.5)), expected)


# -- the two kinds of value --------------------------------------------------------------------------------------------


def test_a_private_gradient_is_made_in_one_place_and_a_sum_is_released_once() -> None:
    with pytest.raises(ProtocolError, match="noise mechanism only"):
        PrivateGradient({}, std=1.0, step=0, seal=object())
    model = nn.Linear(D, 1)
    total = clipped_sum(recorded_of(model, (torch.ones(2, D),), lambda m, b: m(*b)[:, 0]), trainable(model), Flat(1.0))
    assert "tensor" not in repr(total)
    noise = GaussianNoise(noise_for("cpu", secure_mode=False, key=NoiseKey.fresh()))
    released = noise.release(total, multiplier=1.0, step=0)
    assert "tensor" not in repr(released)
    with pytest.raises(ProtocolError, match="released before"):
        noise.release(total, multiplier=1.0, step=1)
    with pytest.raises(ProtocolError, match="not copied"):
        copy.deepcopy(released)
    assert total.values == {}


def test_sums_of_physical_batches_add_up_to_that_of_the_logical_one() -> None:
    model, batch, loss = model_of("merged axes"), batch_of("merged axes", 5), ZOO["merged axes"].loss
    parts = [tuple(t[s] for t in batch) for s in (slice(0, 2), slice(2, 5))]
    first, second = (clipped_sum(recorded_of(model, p, loss), trainable(model), Flat(0.5)) for p in parts)
    whole = first.add(second)
    assert_exact(dict(whole.values), reference(model, batch, loss, Flat(0.5)))
    with pytest.raises(ProtocolError):
        second.take()
    other = clipped_sum(recorded_of(model, parts[0], loss), trainable(model), Flat(0.6))
    with pytest.raises(ProtocolError, match="sensitivities"):
        whole.add(other)


# -- a rule of one's own -----------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class WronglyScaled(Scale):
    """Has a rule with a bug, below."""


@register_rule(Scale)
def _scale(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Mapping[str, Tensor]:
    return {"weight": gradient * inputs[0]}


@register_rule(WronglyScaled)
def _wrong(module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> Mapping[str, Tensor]:
    return {"weight": 0.9 * gradient * inputs[0]}


@pytest.mark.parametrize("door", ["paper", "explicit"])
def test_a_rule_of_ones_own_is_one_function_and_is_checked(door: str) -> None:
    model, batch, loss = nn.Sequential(Scale(), nn.Linear(D, 2)).double(), batch_of("linear", 5), ZOO["linear"].loss
    expected = reference(model, batch, loss, Flat(0.5))
    assert_exact(door_sum(door, model, batch, loss=loss, policy=Flat(0.5)), expected)
    wrong = nn.Sequential(WronglyScaled(), nn.Linear(D, 2)).double()
    with pytest.raises(CoverageError, match=r"0\.weight"):
        door_sum(door, wrong, batch, loss=loss, policy=Flat(0.5))
