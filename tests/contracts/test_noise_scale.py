"""Law 8: whatever a schedule changes, the noise is the multiplier times what one example can move that very sum.

Each step is compared with the micro-batch reference, clipped as the schedule says by then. What is left over must be
noise of the one standard deviation that the guarantee needs, in every group of parameters. Keys are reproducible here,
so that a test of a law has the same outcome in every run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import BatchMemoryManager, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep
from privet.clipping import ClippingPolicy, PerLayer
from privet.noise import GaussianNoise
from privet.schedules import Listed, Schedule
from privet.training.update import update_of
from tests.contracts.doors import reference, taken
from tests.gradients.policies import POLICIES, weights_an_example
from tests.noise.law import refutations

torch.set_num_threads(1)
N, RATE, SIGMA, CLIP = 32, 0.5, 0.4, 0.7
COURSES = {
    "nothing": {},
    "the clip norm": {"clip_norm": (1.0, 0.25, 3.0, 0.05, 1.0)},
    "the noise": {"noise": (1.0, 0.5, 2.0, 0.25, 1.0)},
    "the rate": {"rate": (1.0, 0.5, 2.0, 0.25, 1.0)},
    "everything": {
        "clip_norm": (1.0, 0.25, 3.0, 0.05, 1.0),
        "noise": (1.0, 3.0, 0.5, 2.0, 1.0),
        "rate": (1.0, 0.5, 2.0, 0.25, 1.0),
    },
}


class Two(nn.Module):
    """Two layers with one output each that has a gradient, far above every clip norm: the rest is noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(60, 100, bias=False), nn.Linear(60, 80, bias=False)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:  # (B, 60) -> (B,)
        first = self.first(x)[:, 0]
        return 1e3 * (first + 2.0 * self.second(x)[:, 0] if self.both else first)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


ALL_POLICIES: dict[str, Callable[[nn.Module, float], ClippingPolicy]] = {
    **POLICIES,
    "per layer, each its own": lambda module, bound: PerLayer({"first": 0.6 * bound, "second": 0.8 * bound}),
}
DOORS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, a summed loss": {"loss_reduction": "sum"},
    "paper, hooks": {"grad_sample_mode": "hooks"},
    "paper, virtual steps": {"physical": 5},
    "paper, a partition": {"poisson_sampling": False},
    "explicit": {},
    "explicit, two passes": {"passes": 2},
    "explicit, physical batches": {"physical_batch_size": 5},
    "explicit, padded": {"padded": True},
}


@dataclass
class Run:
    """A private run at one door, under schedules, and the noise of every step that it takes."""

    door: str
    policy: str = "flat"
    course: dict[str, tuple[float, ...]] = field(default_factory=dict)
    by_hand: bool = False
    rate: float = RATE
    seed: int = 1

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model, self.data = Two(), TensorDataset(torch.randn(N, 60))
        self.plain = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.options = dict(DOORS[self.door])
        self.physical = self.options.pop("physical", None)
        self.divided = self.options.get("loss_reduction") != "sum"
        policy, generator = self.clipped_to(CLIP), torch.Generator().manual_seed(self.seed)
        if self.door.startswith("paper"):
            *_, self.loader = PrivacyEngine(accountant="rdp").make_private(
                module=self.model,
                optimizer=self.optimizer,
                data_loader=DataLoader(self.data, batch_size=round(N * self.rate)),
                noise_multiplier=SIGMA,
                max_grad_norm=policy.sensitivity,
                clipping=policy,
                noise_generator=generator,
                **self.options,
            )
            self.take: Callable[[Any], object] = self._backward_and_step
        else:
            self.take = step = PrivateStep(
                self.model,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=Poisson(self.rate), clipping=policy, noise=Gaussian(SIGMA), steps=5),
                loss_per_example=loss,
                expected_batch_size=N * self.rate,
                noise_generator=generator,
                performance=Performance(**self.options),
            )
            self.loader = step.batches(self.data)
        self.seen, self.sizes = taken(self.model, self.optimizer), list[int]()
        self.schedule = None
        if self.course and not self.by_hand:
            listed = {name: Listed(factors) for name, factors in self.course.items()}
            self.schedule = Schedule(self.optimizer, **listed)

    def clipped_to(self, bound: float) -> ClippingPolicy:
        return ALL_POLICIES[self.policy](self.model, bound)

    def factor(self, name: str, t: int) -> float:
        return self.course[name][t] if name in self.course else 1.0

    def _backward_and_step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        losses = loss(self.model, batch)
        (losses.mean() if self.divided and len(losses) else losses.sum()).backward()
        self.optimizer.step()

    def _logical_batches(self) -> Iterator[list[Tensor]]:
        """Takes one pass, and yields the rows of each logical batch when its step is over."""
        rows: list[Tensor] = []
        with (
            BatchMemoryManager(data_loader=self.loader, max_physical_batch_size=self.physical, optimizer=self.optimizer)
            if self.physical
            else nullcontext(self.loader)
        ) as parts:
            for batch in parts:
                rows.append(batch[0])
                self.take(batch)
                if not self.physical or parts.last:
                    yield rows
                    rows = []

    def noise(self, steps: int = 5) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Yields each step's noise on the sum, by parameter, and the standard deviation that it must have."""
        passes = itertools.chain.from_iterable(self._logical_batches() for _ in itertools.count())
        for t, rows in enumerate(itertools.islice(passes, steps)):
            self.sizes.append(sum(map(len, rows)))
            bound = CLIP * self.factor("clip_norm", t)  # of each policy here, by its formula: not what it says itself
            policy = self.clipped_to(bound)
            expected = reference(self.plain, (torch.cat(rows),), loss, policy)
            divisor = N * self.rate * self.factor("rate", t) if self.divided else 1.0
            yield (
                {name: gradient.double() * divisor - expected[name] for name, gradient in self.seen[-1].items()},
                SIGMA * self.factor("noise", t) * bound,
            )
            if t + 1 < steps:
                self._change(t + 1)

    def _change(self, t: int) -> None:
        if self.schedule is not None:
            self.schedule.step()
        elif self.by_hand:
            policy = self.clipped_to(CLIP * self.factor("clip_norm", t))
            changed = replace(update_of(self.optimizer).mechanism, clipping=policy)
            update_of(self.optimizer).mechanism = changed


def wrong_steps(run: Run) -> list[tuple[int, str, list[str]]]:
    """Returns the steps and parameters whose noise is not of the law, and the tests that say so."""
    found = [
        (t, name, refutations(noise.numpy(), std))
        for t, (noises, std) in enumerate(run.noise())
        for name, noise in noises.items()
    ]
    assert len(found) == 5 * 2
    return [each for each in found if each[2]]


PAIRS = [
    (door, policy)
    for door, (policy, make) in itertools.product(DOORS, ALL_POLICIES.items())
    if DOORS[door].get("passes") != 2 or weights_an_example(make(Two(), 1.0), Two()) == 1
]


# Half of the pairs, each door and each policy among them; the rest with the deep tests.
@pytest.mark.parametrize(
    ("door", "policy"), [pytest.param(*pair, marks=[pytest.mark.deep] if i % 2 else []) for i, pair in enumerate(PAIRS)]
)
def test_the_noise_follows_a_scheduled_clip_norm(door: str, policy: str) -> None:
    assert wrong_steps(Run(door, policy, COURSES["the clip norm"])) == []


@pytest.mark.parametrize("door", [door for door in DOORS if "partition" not in door])  # which has no rate
@pytest.mark.parametrize("what", COURSES)
def test_the_noise_and_its_divisor_are_as_scheduled(what: str, door: str) -> None:
    assert wrong_steps(Run(door, "flat", COURSES[what])) == []


@pytest.mark.parametrize("door", ["paper", "explicit"])
@pytest.mark.parametrize("policy", ["flat", "per layer", "group-wise"])
def test_a_policy_that_is_replaced_by_hand_brings_its_own_noise(policy: str, door: str) -> None:
    assert wrong_steps(Run(door, policy, COURSES["the clip norm"], by_hand=True)) == []


@pytest.mark.parametrize("door", [door for door in DOORS if "partition" not in door])  # which has no empty batch
def test_an_empty_batch_has_noise_like_any_other(door: str) -> None:
    run = Run(door, rate=1 / N)
    assert wrong_steps(run) == []
    assert 0 in run.sizes
    assert max(run.sizes) > 0


@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_nobody_uses_has_noise_like_any_other(door: str) -> None:
    run = Run(door)
    run.model.both = run.plain.both = False
    assert wrong_steps(run) == []


# -- that these tests can fail -----------------------------------------------------------------------------------------


def _once_more(first: float) -> Callable[..., float]:
    """Returns a standard deviation in which the change of the clip norm is counted twice."""
    return lambda total, multiplier: multiplier * total.sensitivity * (total.sensitivity / first)


PLANTED: dict[str, Callable[[float], Callable[..., float]]] = {
    "the change of the clip norm counted twice": _once_more,
    "the first clip norm for ever": lambda first: lambda total, multiplier: multiplier * first,
    "the noise of one of two groups": lambda first: lambda total, multiplier: multiplier * total.sensitivity / 2**0.5,
}


@pytest.mark.parametrize("door", ["paper", "explicit"])
@pytest.mark.parametrize("bug", PLANTED)
def test_noise_of_another_size_is_seen(bug: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(door, "per layer", COURSES["the clip norm"])
    monkeypatch.setattr(GaussianNoise, "_std", staticmethod(PLANTED[bug](CLIP)))
    assert len(wrong_steps(run)) >= 3 * 2
