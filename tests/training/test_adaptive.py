"""Adaptive clipping at both doors: the bound moves by the noisy count alone, and both releases cost what one does."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Adaptive,
    BatchMemoryManager,
    ConfigurationError,
    Exponential,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    Schedule,
)
from privet.accounting.event import ClipCountEvent, PoissonEvent
from privet.clipping import ClippingPolicy
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.reference import example_gradients
from privet.noise.key import NoiseKey
from privet.noise.secure import SecureNoise
from privet.training import clip_count
from privet.training.clip_count import adapted, counted, refuse_adaptive
from tests.contracts.doors import assert_exact, reference, taken

torch.set_num_threads(1)
N, BATCH = 40, 10
POLICY = Adaptive(clip_norm=0.8, quantile=0.4, learning_rate=0.3)


def entropy(net: nn.Module, batch: Any) -> Tensor:  # (B,)
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def norms(net: nn.Module, batch: Any) -> Tensor:  # (B,)
    rows = [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    found = example_gradients(net, rows, lambda m, b: entropy(m, b).sum())
    return torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()


class Run:
    """A private run by either door; `bounds` has the clip norm of each step, and `batches` what it was on."""

    def __init__(
        self, door: str, *, sigma: float = 0.0, policy: ClippingPolicy = POLICY, lr: float = 0.0, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,)))
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.start = copy.deepcopy(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(5)
        self.step = None
        if door == "paper":
            self.engine: Any = PrivacyEngine()
            *_, self.loader = self.engine.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(self.data, batch_size=BATCH),
                noise_multiplier=sigma,
                clipping=policy,
                noise_generator=generator,
                **options,
            )
        else:
            mechanism = Mechanism(
                sampling=Poisson(BATCH / N), clipping=policy, noise=Gaussian(sigma), steps=options.pop("steps", 4)
            )
            self.engine = self.step = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=mechanism,
                loss_per_example=entropy,
                noise_generator=generator,
                **options,
            )
            self.loader = self.step.batches(self.data)
        self.seen = taken(self.net, self.optimizer)
        self.bounds = [self.bound]
        self.batches: list[Any] = []

    @property
    def bound(self) -> float:
        (mechanism,) = self.engine.mechanisms
        assert isinstance(mechanism.clipping, Adaptive)
        return mechanism.clipping.clip_norm

    def take(self, batch: Any) -> None:
        if self.step is not None:
            self.step(batch)
            return
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        self.optimizer.step()

    def trained(self, loader: Any = None) -> Run:
        for batch in self.loader if loader is None else loader:
            self.batches.append(tuple(t.clone() for t in batch))
            self.take(batch)
            self.bounds.append(self.bound)
        return self


DOORS = pytest.mark.parametrize("door", ["paper", "explicit"])


# -- the rule ----------------------------------------------------------------------------------------------------------


@DOORS
def test_each_step_clips_by_the_bound_before_and_moves_it_by_the_rule(door):
    """At σ = 0, against one backward for each example."""
    run = Run(door).trained()
    assert len(run.seen) == 4
    for i, batch in enumerate(run.batches):
        bound = run.bounds[i]
        expected = reference(run.start, batch, loss=entropy, policy=Flat(bound))
        assert_exact({n: v * BATCH for n, v in run.seen[i].items()}, expected, tolerance=1e-5)
        within = norms(run.start, batch) <= bound
        fraction = (float(within.sum()) - 0.5 * len(within)) / BATCH + 0.5
        assert run.bounds[i + 1] == pytest.approx(bound * math.exp(-0.3 * (fraction - 0.4)), rel=1e-9)
    assert len(set(run.bounds)) == 5


def count_noise_of(key: NoiseKey, *, step: int, std: float) -> float:
    noise = torch.zeros(1, dtype=torch.float64)
    SecureNoise(key).add_many([(".clip_count", noise)], std=std, step=step)
    return float(noise)


def test_the_bound_follows_from_the_noisy_count_of_a_known_key():
    """The noise is the one that the key of the run has at the name of the count, with the declared size."""
    mechanism = Mechanism(sampling=Poisson(0.5), clipping=Adaptive(0.5, count_noise=3.0), noise=Gaussian(1.2))
    gradient = 1.0 / math.sqrt(1.2**-2 - 6.0**-2)
    squared = torch.tensor([[0.01, 0.04, 0.2, 1.0, 0.09, float("inf"), float("nan")]])
    for step in range(3):
        clipped = ClippedSum({"w": torch.zeros(2)}, 0.5, {"norms": squared})
        joint = counted(clipped, mechanism)
        assert joint.sensitivity == pytest.approx(math.hypot(0.5, 0.5 * gradient * 0.5 / 3.0), rel=1e-12)
        noise = mechanism.noise.mechanism(SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(1))))
        released = noise.release(joint, multiplier=1.2, step=step)
        assert released.std == pytest.approx(gradient * 0.5, rel=1e-12)
        values = released.values
        after = adapted(values, mechanism, expected=lambda: 8.0).clipping
        drawn = count_noise_of(NoiseKey.from_generator(torch.Generator().manual_seed(1)), step=step, std=3.0)
        fraction = (4 - 7 / 2 + drawn) / 8.0 + 0.5
        assert isinstance(after, Adaptive)
        assert after.clip_norm == pytest.approx(0.5 * math.exp(-0.2 * (fraction - 0.5)), rel=1e-9)
        assert set(values) == {"w"}


def test_both_noises_have_their_sizes():
    """Over many steps on nobody's data: the gradient's noise is z_g C, the count's s, and they are independent."""
    mechanism = Mechanism(sampling=Poisson(0.5), clipping=Adaptive(0.5, count_noise=2.0), noise=Gaussian(1.5))
    gradient = 1.0 / math.sqrt(1.5**-2 - 4.0**-2)
    noise = mechanism.noise.mechanism(SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(2))))
    counts, sums = [], []
    for step in range(1500):
        empty = ClippedSum({"w": torch.zeros(1, dtype=torch.float64)}, 0.5, {"norms": torch.zeros(1, 0)})
        values = noise.release(counted(empty, mechanism), multiplier=1.5, step=step).values
        sums.append(float(values["w"]))
        after = adapted(values, mechanism, expected=lambda: 1.0).clipping
        assert isinstance(after, Adaptive)
        counts.append(-math.log(after.clip_norm / 0.5) / 0.2)
    count, total = torch.tensor(counts), torch.tensor(sums)
    # The standard deviation of 1500 normals is within 9 % but once in a million times.
    assert float(count.std()) == pytest.approx(2.0, rel=0.09)
    assert float(total.std()) == pytest.approx(gradient * 0.5, rel=0.09)
    assert abs(float(torch.corrcoef(torch.stack([count, total]))[0, 1])) < 0.13


def test_the_bound_comes_to_the_quantile():
    policy = Adaptive(clip_norm=0.01, quantile=0.7, learning_rate=0.2, count_noise=5.0)
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(1.0))
    noise = mechanism.noise.mechanism(SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(3))))
    generator = torch.Generator().manual_seed(4)
    found = []
    for step in range(300):
        squared = torch.empty(1, 200).log_normal_(2.0, 1.0, generator=generator)
        clipped = ClippedSum({"w": torch.zeros(1)}, mechanism.clipping.sensitivity, {"norms": squared})
        values = noise.release(counted(clipped, mechanism), multiplier=1.0, step=step).values
        mechanism = adapted(values, mechanism, expected=lambda: 200.0)
        found.append(mechanism.clipping.sensitivity)
    quantile = math.exp((2.0 + 0.5244) / 2.0)  # of the norms: the root of a log-normal
    assert torch.tensor(found[-100:]).mean() == pytest.approx(quantile, rel=0.05)


# -- what it costs -----------------------------------------------------------------------------------------------------


@DOORS
def test_the_ledger_has_the_joint_event_whose_cost_is_the_declared_one(door):
    run = Run(door, sigma=1.3).trained()
    (phase,) = run.engine.ledger.phases
    gradient = 1.3 / math.sqrt(0.99)
    assert phase.count == 4
    assert isinstance(phase.event, PoissonEvent)
    event = phase.event.event
    assert isinstance(event, ClipCountEvent)
    assert (event.noise_multiplier, event.count_noise) == pytest.approx((gradient, 6.5), rel=1e-12)
    plain = Mechanism(sampling=Poisson(BATCH / N), clipping=Flat(1.0), noise=Gaussian(1.3), steps=4)
    assert run.engine.epsilon(1e-5) == pytest.approx(plain.epsilon(1e-5), rel=1e-9)
    assert run.engine.epsilon(1e-5) <= plain.epsilon(1e-5)


def test_the_gradients_noise_is_the_larger_one():
    """On an empty batch of the explicit door the gradient is noise alone."""
    policy = Adaptive(0.8, count_noise=1.0)
    gradient = 1.0 / math.sqrt(1.2**-2 - 2.0**-2)
    run = Run("explicit", sigma=1.2, policy=policy, expected_batch_size=BATCH)
    empty = (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    found = []
    for _ in range(40):
        bound = run.bound
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a step was taken on a batch")
            run.take(empty)
        found.append(torch.cat([v.flatten() for v in run.seen[-1].values()]) * BATCH / bound)
    assert float(torch.cat(found).std()) == pytest.approx(gradient, rel=0.08)


def test_calibration_pays_for_the_count_too():
    planned = Mechanism(sampling=Poisson(0.01), clipping=Adaptive(1.0, count_noise=5.0), noise=Gaussian(1.0), steps=500)
    found = planned.calibrated(epsilon=2.0, delta=1e-5)
    assert found.epsilon(1e-5) <= 2.0
    flat = Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=500)
    assert found.noise.multiplier == flat.calibrated(epsilon=2.0, delta=1e-5).noise.multiplier


# -- with everything else ----------------------------------------------------------------------------------------------


def test_virtual_steps_move_the_bound_once_a_logical_step():
    whole, parts = Run("paper", sigma=1.0).trained(), Run("paper", sigma=1.0)
    manager = BatchMemoryManager(data_loader=parts.loader, max_physical_batch_size=3, optimizer=parts.optimizer)
    with manager as physical:
        for batch in physical:
            before = parts.bound
            parts.take(batch)
            if physical.last:
                parts.bounds.append(parts.bound)
            else:
                assert parts.bound == before
    assert parts.bounds == pytest.approx(whole.bounds, rel=1e-9)
    small = Run("explicit", sigma=1.0, performance=Performance(physical_batch_size=3)).trained()
    assert small.bounds == pytest.approx(Run("explicit", sigma=1.0).trained().bounds, rel=1e-9)


def test_accumulation_moves_the_bound_once_a_logical_step():
    run = Run("paper", sigma=1.0, accumulate=2)
    for i, (x, y) in enumerate(run.loader):
        (F.cross_entropy(run.net(x), y) / 2).backward()
        assert len(set(run.bounds) | {run.bound}) == len(run.bounds)
        if i % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.bounds.append(run.bound)
    assert len(run.bounds) == 3


def test_a_sum_counts_the_expected_batch_too():
    mean, total = Run("paper").trained(), Run("paper", loss_reduction="sum")
    for batch in total.loader:
        total.optimizer.zero_grad()
        F.cross_entropy(total.net(batch[0]), batch[1], reduction="sum").backward()
        total.optimizer.step()
        total.bounds.append(total.bound)
    assert total.bounds == pytest.approx(mean.bounds, rel=1e-9)


def test_modes_that_show_gradients_adapt_too():
    assert Run("paper", grad_sample_mode="hooks").trained().bounds == pytest.approx(Run("paper").trained().bounds)


def test_padded_examples_are_not_counted():
    padded = Performance(padded=True, physical_batch_size=32)
    assert Run("explicit", performance=padded).trained().bounds == pytest.approx(Run("explicit").trained().bounds)


@DOORS
def test_schedules_of_noise_and_rate_keep_the_bound(door):
    run = Run(door, sigma=1.0)
    schedule = Schedule(run.optimizer, noise=Exponential(0.9), rate=Exponential(1.1))
    for batch in itertools.islice(run.loader, 3):
        run.take(batch)
        before = run.bound
        schedule.step()
        assert run.bound == before != 0.8
    with pytest.raises(ConfigurationError, match="follows the norms"):
        Schedule(run.optimizer, clip_norm=Exponential(0.9))


@DOORS
def test_a_run_resumes_with_the_bound_that_it_had_come_to(door):
    unbroken, first, second = (Run(door, sigma=1.0) for _ in range(3))
    unbroken.trained()
    first.trained(itertools.islice(first.loader, 2))
    second.engine.load_state_dict(first.engine.state_dict())
    second.loader.load_state_dict(first.loader.state_dict())
    assert second.bound == first.bound
    second.trained()
    assert [*first.bounds, *second.bounds[1:]][-2:] == pytest.approx(unbroken.bounds[-2:], rel=1e-9)


def test_the_name_is_at_the_papers_door():
    run = Run("paper", policy=Adaptive(0.8))
    by_name = Run("paper", policy="adaptive", max_grad_norm=0.8)  # type: ignore[arg-type]
    assert by_name.engine.mechanisms == run.engine.mechanisms


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"quantile": 0.0}, "between 0 and 1"),
        ({"quantile": 1.5}, "quantile"),
        ({"learning_rate": -0.1}, "learning_rate"),
        ({"count_noise": 0.0}, "count_noise"),
        ({"clip_norm": Flat(1.0)}, "several groups"),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        Adaptive(**{"clip_norm": 1.0, **options})


def test_a_count_that_costs_more_than_is_declared_is_refused():
    with pytest.raises(ConfigurationError, match=r"more than 1\b"):
        Mechanism(sampling=Poisson(0.1), clipping=Adaptive(1.0, count_noise=1.0), noise=Gaussian(2.0))


def test_a_compiled_step_is_refused():
    with pytest.raises(ConfigurationError, match="compile=False with Adaptive"):
        Run("explicit", performance=Performance(compile=True))


def test_a_sharded_model_is_refused():
    spread: Any = SimpleNamespace(collective=True)
    refuse_adaptive(Flat(1.0), spread)
    with pytest.raises(ConfigurationError, match="sharded over ranks"):
        refuse_adaptive(Adaptive(1.0), spread)


def test_the_bound_stays_a_number_whatever_the_noise():
    policy = Adaptive(1.0, learning_rate=100.0)
    assert policy.after(fraction=1e300).after(fraction=1e300).clip_norm == 1e-12
    assert policy.after(fraction=-1e300).after(fraction=-1e300).clip_norm == 1e12


# -- planted bugs ------------------------------------------------------------------------------------------------------


def test_the_exact_count_would_be_seen(monkeypatch):
    """A mutant that moves the bound by the count before its noise."""
    exact: list[float] = []

    def counting(clipped, mechanism):
        exact.append(float(clip_count._recentred(clipped.statistics["norms"][0], mechanism.clipping.clip_norm)))
        return counted(clipped, mechanism)

    def cheating(values, mechanism, *, expected):
        adapted(values, mechanism, expected=expected)
        return clip_count.replace(mechanism, clipping=mechanism.clipping.after(exact[-1] / expected() + 0.5))

    honest = Run("paper", sigma=1.0).trained().bounds
    monkeypatch.setattr("privet.training.update.counted", counting)
    assert Run("paper", sigma=1.0).trained().bounds == honest
    monkeypatch.setattr("privet.training.update.adapted", cheating)
    assert Run("paper", sigma=1.0).trained().bounds != pytest.approx(honest, rel=1e-3)
    monkeypatch.setattr("privet.training.update.adapted", adapted)
    assert clip_count.adapted is adapted


def test_noise_that_is_not_split_would_be_seen(monkeypatch):
    """A mutant whose gradient has the declared multiplier beside a count: both together cost more than is billed."""
    monkeypatch.setattr(Adaptive, "split", lambda self, multiplier: (multiplier, self.count_noise or 5.0 * multiplier))
    run = Run("explicit", sigma=1.3).trained()
    plain = Mechanism(sampling=Poisson(BATCH / N), clipping=Flat(1.0), noise=Gaussian(1.3), steps=4)
    assert run.engine.epsilon(1e-5) > plain.epsilon(1e-5) * (1 + 1e-4)
