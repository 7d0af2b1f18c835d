"""Correlated noise in a run: billed as it ran, begun anew where batches do not follow, refused where nobody knows."""

from __future__ import annotations

import io
import itertools
import json
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from privet import (
    BatchMemoryManager,
    Budget,
    BudgetExceededError,
    ConfigurationError,
    CyclicPoisson,
    Flat,
    Gaussian,
    Mechanism,
    Partition,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    RandomAllocation,
    Sampling,
)
from privet.accounting import (
    CorrelatedEvent,
    GaussianEvent,
    Ledger,
    PartitionEvent,
    PoissonEvent,
    Relation,
    Toeplitz,
    get_epsilon,
    in_one_participation,
    repeated,
)
from privet.noise import BLT, BandMF, LambdaCGD
from privet.sampling.draw import address, poisson_indices

N, B, S = 12, 3, 4
DATA = torch.utils.data.TensorDataset(torch.randn(N, 2, generator=torch.Generator().manual_seed(3)))
PARTITION = Partition(batch_size=B, dataset_size=N)
BANDS = BandMF(1.0, (1.0, 0.5, 0.2))


def step_of(noise=BANDS, *, sampling=PARTITION, seed: int | None = 1, bias: bool = True, **options) -> PrivateStep:
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=bias).double()
    return PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=noise, steps=3),
        loss_per_example=lambda model, batch: model(batch[0].double()).square().sum(1),
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )


def parameters(step: PrivateStep) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


@pytest.mark.parametrize(
    "noise", [BANDS, BLT(1.0, (0.3,), (0.9,)), LambdaCGD(1.0, 0.8)], ids=lambda n: type(n).__name__
)
def test_what_ran_is_what_was_planned_and_billed_as_one_gaussian(noise):
    step = step_of(noise)
    loader = step.batches(DATA)
    for _ in range(3):
        for batch in loader:
            step(batch)
    squared = noise.matrix.squared_sensitivity(3, S)
    assert step.ledger.event() == CorrelatedEvent(3, S, noise.event) == step.mechanism.event()
    wanted = get_epsilon(GaussianEvent(1.0 / math.sqrt(squared)), 1e-5, relation=Relation.ZERO_OUT)
    assert step.epsilon(1e-5) == pytest.approx(wanted, rel=1e-9)
    for accountant in ("rdp", "gdp"):
        other = get_epsilon(GaussianEvent(1.0 / math.sqrt(squared)), 1e-5, accountant=accountant)
        assert step.epsilon(1e-5, accountant=accountant) == pytest.approx(other, rel=1e-9)
    for batch in loader:  # more passes than planned are billed as what they are
        step(batch)
    assert step.ledger.event() == CorrelatedEvent(4, S, noise.event)


def brute(matrix: Toeplitz, steps: int, separation: int) -> float:
    """Returns the largest ‖Σ C e_t‖² over all sets of steps that are so far apart, by trying them all."""
    column = torch.tensor(matrix.column(steps))
    columns = torch.stack([torch.cat([torch.zeros(t, dtype=torch.float64), column[: steps - t]]) for t in range(steps)])
    best = 0.0
    for chosen in range(1 << steps):
        places = [t for t in range(steps) if chosen >> t & 1]
        if all(later - earlier >= separation for earlier, later in itertools.pairwise(places)):
            best = max(best, float(columns[places].sum(0).square().sum()))
    return best


@pytest.mark.parametrize(
    "matrix",
    [
        Toeplitz((1.0, 0.5, 0.2)),
        Toeplitz((2.0, 2.0, 1.9, 1.5, 1.0, 0.1)),
        Toeplitz((1.0,), (0.3, 0.2), (0.95, 0.4)),
        Toeplitz((1.0,), (0.9,), (0.9,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("separation", [1, 2, 3, 5])
def test_the_sensitivity_is_the_largest_over_all_participations(matrix, separation):
    passes = 10 // separation
    found = matrix.squared_sensitivity(passes, separation) * matrix.squared_norm
    assert found == pytest.approx(brute(matrix, passes * separation, separation), rel=1e-9)


def test_many_passes_are_bounded_by_the_limit_of_a_block(monkeypatch):
    from privet.accounting import toeplitz

    for matrix in (Toeplitz((1.0, 0.9, 0.8, 0.7)), Toeplitz((1.0,), (0.3, 0.2), (0.95, 0.4))):
        exact = matrix.squared_sensitivity(400, 3)
        toeplitz._squared_sensitivity.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(toeplitz, "_MOST_BLOCKS", 100)
            assert exact <= matrix.squared_sensitivity(400, 3) <= exact * 1.05
        toeplitz._squared_sensitivity.cache_clear()


def test_phases_never_cost_less_together_than_apart():
    for matrix in (BANDS.matrix, Toeplitz((1.0,), (0.3, 0.2), (0.95, 0.4))):
        for separation in (1, 2, 4):
            squared = [matrix.squared_sensitivity(k, separation) for k in range(8)]
            for one in range(8):
                for other in range(8 - one):
                    assert squared[one] + squared[other] <= squared[one + other] * (1 + 1e-9)


def released(step: PrivateStep, data, passes: int) -> torch.Tensor:
    """Returns the released sums of each step, at a learning rate of 0: shape (steps, parameters)."""
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    rows = []
    step.optimizer.register_step_pre_hook(
        lambda *_: rows.append(
            torch.cat([p.grad.flatten() for p in step.model.parameters()]) * step._update.divisor.value
        )
    )
    loader = step.batches(data)
    for _ in range(passes):
        for batch in loader:
            step(batch)
    return torch.stack(rows)


@pytest.mark.parametrize("place", [0, 5, N - 1])
def test_a_record_moves_c_times_the_sums_by_at_most_what_is_billed(place):
    noise, passes = BLT(0.0, (0.3, 0.2), (0.95, 0.4)), 3  # without noise the sums themselves are released
    zeroed, huge = (DATA.tensors[0].clone() for _ in range(2))
    zeroed[place], huge[place] = 0.0, torch.tensor([300.0, 400.0])  # without a bias, zeros have no gradient
    one, other = (
        released(step_of(noise, bias=False), torch.utils.data.TensorDataset(rows), passes) for rows in (zeroed, huge)
    )
    column = torch.tensor(noise.matrix.column(passes * S))
    moved = torch.zeros_like(one)
    for t in range(passes * S):
        moved[t:] += column[: passes * S - t, None] * (one[t] - other[t])
    most = math.sqrt(noise.matrix.squared_sensitivity(passes, S) * noise.matrix.squared_norm)
    assert float(moved.norm()) <= most * (1 + 1e-9)
    assert float(moved.norm()) > most * (0.999 if place == 0 else 0.5)  # a record of the first batch reaches it


def test_the_released_noise_is_the_inverse_of_c_over_passes():
    noisy, plain = released(step_of(BANDS), DATA, 2), released(step_of(BandMF(0.0, BANDS.coefficients)), DATA, 2)
    rows = released(step_of(BandMF(1.0, (1.0,))), DATA, 2) - plain
    column = torch.tensor(BANDS.matrix.column(2 * S)) / BANDS.matrix.squared_norm**0.5
    dense = torch.zeros(2 * S, 2 * S, dtype=torch.float64)
    for t in range(2 * S):
        dense[t:, t] = column[: 2 * S - t]
    assert torch.allclose(noisy - plain, torch.linalg.solve(dense, rows), atol=1e-9)


def train(step: PrivateStep, loader) -> None:
    for batch in loader:
        step(batch)


@dataclass(frozen=True)
class InTurn(Sampling):
    """A sampler of one's own: step i of a pass draws from every `parts`-th example, beginning with example i."""

    rate: float
    parts: int
    billed_per = "pass"
    random_size = True
    resumable = True

    def event_for(self, base_event, count=1):
        return repeated(PartitionEvent(1, PoissonEvent(self.rate, in_one_participation(base_event, self.parts))), count)

    def shared(self, words, *, size, number):
        return None

    def draw(self, words, *, size, number, index, shared):
        part = range(index, size, self.parts)
        chosen = poisson_indices(words, rate=self.rate, size=len(part), step=address(number, index), name="in turn")
        return [part[i] for i in chosen]

    def steps_per_pass(self, size):
        return self.parts

    def expected_batch_size(self, size):
        return self.rate * size / self.parts

    def scaled(self, factor):
        raise NotImplementedError


def test_batches_drawn_in_turn_are_amplified_and_empty_ones_are_steps_like_any_other():
    sampling = InTurn(0.3, S)

    def run_of(noise):
        return step_of(noise, sampling=sampling)

    noisy, plain = run_of(BANDS), run_of(BandMF(0.0, BANDS.coefficients))
    found = released(noisy, DATA, 3) - released(plain, DATA, 3)
    rows = released(run_of(BandMF(1.0, (1.0,))), DATA, 3) - released(run_of(BandMF(0.0, (1.0,))), DATA, 3)
    column = torch.tensor(BANDS.matrix.column(3 * S)) / BANDS.matrix.squared_norm**0.5
    dense = torch.stack([torch.cat([torch.zeros(t, dtype=torch.float64), column[: 3 * S - t]]) for t in range(3 * S)]).T
    assert torch.allclose(found, torch.linalg.solve(dense, rows), atol=1e-9)
    assert len(found) == 3 * S
    assert any(not step_rows.any() for step_rows in released(run_of(BandMF(0.0, (1.0,))), DATA, 3))  # of nobody
    amplified = PartitionEvent(3, PoissonEvent(0.3, GaussianEvent(1.0)))
    assert noisy.ledger.event() == amplified
    with pytest.raises(ConfigurationError, match="take part again"):
        step_of(BandMF(1.0, (1.0, 0.9, 0.8, 0.7, 0.6)), sampling=sampling)


def test_cyclic_poisson_sampling_takes_as_many_bands_as_parts():
    cyclic = CyclicPoisson(rate=0.3, parts=S)
    step = step_of(sampling=cyclic)
    loader = step.batches(DATA)
    for _ in range(2):
        train(step, loader)
    assert begun(step) == 0
    assert step.ledger.event() == PartitionEvent(2, PoissonEvent(0.3, GaussianEvent(1.0)))
    with pytest.raises(ConfigurationError, match="take part again"):
        step_of(LambdaCGD(1.0, 0.5), sampling=cyclic)
    with pytest.raises(ConfigurationError, match="keeps the steps"):
        step_of(sampling=RandomAllocation(S))


def begun(step: PrivateStep) -> int:
    return step._update.noise.state_dict()["source"]["began"]


def test_a_pass_that_is_left_early_begins_the_correlation_anew_and_stays_billed():
    step = step_of()
    loader = step.batches(DATA)
    for index, batch in enumerate(loader):
        if index == 2:
            break
        step(batch)
    assert begun(step) == 0
    with pytest.warns(UserWarning, match="begins anew"):
        train(step, loader)
    assert begun(step) == 2
    assert step.ledger.event() == CorrelatedEvent(2, S, BANDS.event)


def test_a_second_loader_begins_the_correlation_anew():
    step = step_of()
    for batch in step.batches(DATA):
        step(batch)
    with pytest.warns(UserWarning, match="begins anew"):
        train(step, step.batches(DATA))
    assert begun(step) == S


def test_a_step_on_a_batch_of_ones_own_is_refused_and_nothing_is_billed():
    step = step_of(expected_batch_size=3.0)
    before = parameters(step)
    with pytest.raises(ProtocolError, match="not certain which whole batch"):
        step((torch.randn(3, 2),))
    assert step.ledger.steps == 0
    assert torch.equal(before, parameters(step))
    for batch in step.batches(DATA):
        step(batch)
    assert begun(step) == 0


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Poisson(0.25), "keep"),
        (Partition(shuffled=True, batch_size=B, dataset_size=N), "fixed order"),
        (Partition(batch_size=B), "dataset_size"),
    ],
)
def test_a_sampling_that_does_not_keep_steps_apart_is_refused(sampling, words):
    with pytest.raises(ConfigurationError, match=words):
        Mechanism(sampling=sampling, clipping=Flat(1.0), noise=BANDS)


def test_a_dataset_of_another_size_is_refused():
    with pytest.raises(ConfigurationError, match="12 examples, and there are 11"):
        step_of().batches(torch.utils.data.TensorDataset(torch.randn(N - 1, 2)))


def test_a_release_without_a_known_separation_has_no_finite_epsilon():
    for accountant in ("pld", "rdp", "gdp"):
        assert get_epsilon(BANDS.event, 1e-5, accountant=accountant) == math.inf


def test_bands_within_the_parts_of_a_cycle_are_gaussian_participations():
    assert in_one_participation(BANDS.event, 3) == GaussianEvent(1.0)
    assert in_one_participation(GaussianEvent(2.0), 1) == GaussianEvent(2.0)
    assert PoissonEvent(0.1, in_one_participation(BANDS.event, 4)) == PoissonEvent(0.1, GaussianEvent(1.0))
    for event, separation in ((BANDS.event, 2), (LambdaCGD(1.0, 0.5).event, 1000)):
        with pytest.raises(ConfigurationError, match="take part again"):
            in_one_participation(event, separation)


def test_calibration_finds_the_multiplier_of_the_whole_phase():
    mechanism = step_of(LambdaCGD(1.0, 0.8)).mechanism
    found = mechanism.calibrated(epsilon=2.0, delta=1e-5)
    assert 1.99 < found.epsilon(1e-5) <= 2.0
    squared = found.noise.matrix.squared_sensitivity(3, S)
    assert get_epsilon(GaussianEvent(found.noise.multiplier / math.sqrt(squared)), 1e-5) == pytest.approx(
        found.epsilon(1e-5), rel=1e-6
    )


def test_a_budget_refuses_the_pass_that_would_exceed_it():
    planned = step_of().mechanism
    step = step_of(budget=Budget(planned.epsilon(1e-5) * 1.0001, 1e-5))
    loader = step.batches(DATA)
    for _ in range(3):
        for batch in loader:
            step(batch)
    with pytest.raises(BudgetExceededError):
        step(next(iter(loader)))
    assert step.ledger.event() == planned.event()


def test_a_multiplier_that_changes_begins_anew_and_is_a_phase_of_its_own():
    step = step_of()
    loader = step.batches(DATA)
    for multiplier in (1.0, 2.0):
        now = step.mechanism
        step._update.mechanism = Mechanism(
            sampling=now.sampling, clipping=now.clipping, noise=now.noise.with_multiplier(multiplier), steps=3
        )
        for batch in loader:
            step(batch)
    assert begun(step) == S
    assert [phase.event.event.noise_multiplier for phase in step.ledger.phases] == [1.0, 2.0]


@pytest.mark.parametrize("noise", [BANDS, LambdaCGD(1.0, 0.8)], ids=["bands", "lambda"])
def test_a_reproducible_run_resumes_bit_equal_in_the_middle_of_a_pass(noise):
    def halves(*, cut: bool) -> PrivateStep:
        step = step_of(noise)
        loader = step.batches(DATA)
        for done, batch in enumerate(loader):
            step(batch)
            if cut and done == 1:
                break
        if cut:
            file, state = io.BytesIO(), loader.state_dict()
            step.save_checkpoint(file)
            file.seek(0)
            step = step_of(noise)
            loader = step.batches(DATA)
            step.load_checkpoint(file)
            loader.load_state_dict(state)
            for batch in loader:
                step(batch)
        for batch in loader:
            step(batch)
        return step

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(parameters(halves(cut=True)), parameters(halves(cut=False)))


def test_a_secret_run_resumes_under_a_fresh_key_and_anew():
    step = step_of(seed=None)
    loader = step.batches(DATA)
    for batch in loader:
        step(batch)
    file = io.BytesIO()
    step.save_checkpoint(file)
    file.seek(0)
    assert b"independent" in file.getvalue()
    resumed = step_of(seed=None)
    resumed.load_checkpoint(file)
    for batch in resumed.batches(DATA):
        resumed(batch)
    assert begun(resumed) == S
    assert resumed.ledger.event() == CorrelatedEvent(2, S, BANDS.event)


def trained_at_the_papers_door(noise, *, physical: int | None = None) -> tuple[PrivacyEngine, torch.Tensor]:
    torch.manual_seed(0)
    model, engine = nn.Linear(2, 1).double(), PrivacyEngine()
    data = torch.utils.data.TensorDataset(DATA.tensors[0].double())
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=B),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise=noise,
        sampling=PARTITION,
        noise_generator=torch.Generator().manual_seed(1),
    )

    def train(batches) -> None:
        for (rows,) in batches:
            optimizer.zero_grad()
            model(rows).square().sum(1).mean().backward()
            optimizer.step()

    for _ in range(2):
        if physical is None:
            train(loader)
        else:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
            ) as batches:
                train(batches)
    return engine, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_that_fails_before_its_noise_begins_the_correlation_anew(monkeypatch):
    # Otherwise the next batch would take its place in time, and every example come one step sooner than is billed.
    step = step_of()
    batches = iter(step.batches(DATA))
    step(next(batches))
    with monkeypatch.context() as patched:
        patched.setattr("privet.training.update.counted", lambda *_: (_ for _ in ()).throw(RuntimeError("before")))
        with pytest.raises(RuntimeError, match="before"):
            step(next(batches))
    with pytest.warns(UserWarning, match="begins anew"):
        train(step, batches)
    assert begun(step) == 2
    assert step.ledger.event() == CorrelatedEvent(1, S, BANDS.event)


def engine_of(noise, **options):
    model, engine = nn.Linear(2, 1), PrivacyEngine()
    returned = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(DATA, batch_size=B),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise=noise,
        **options,
    )
    return engine, *returned


def test_the_papers_door_refuses_poisson_sampling_and_what_is_no_noise():
    with pytest.raises(ConfigurationError, match="keeps the steps"):
        engine_of(BANDS)
    with pytest.raises(ConfigurationError, match="description"):
        engine_of(3.0)
    with pytest.raises(ConfigurationError, match="Gaussian noise"):
        engine_of(BANDS, sampling=PARTITION, clipping="adaptive")


def test_a_refused_step_at_the_papers_door_leaves_the_run_able_to_go_on():
    engine, model, optimizer, loader = engine_of(BANDS, sampling=PARTITION)
    model(torch.randn(5, 2)).square().sum(1).mean().backward()
    with pytest.raises(ProtocolError, match="not certain which whole batch"):
        optimizer.step()
    assert engine.ledger.steps == 0
    for (rows,) in loader:
        optimizer.zero_grad()
        model(rows).square().sum(1).mean().backward()
        optimizer.step()
    assert engine.ledger.event() == CorrelatedEvent(1, S, BANDS.event)


def test_a_target_is_met_with_the_noise_that_was_given():
    model, engine = nn.Linear(2, 1), PrivacyEngine()
    engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(DATA, batch_size=B),
        sampling=PARTITION,
        noise=LambdaCGD(1.0, 0.8),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=3,
        max_grad_norm=1.0,
    )
    (found,) = engine.mechanisms
    assert isinstance(found.noise, LambdaCGD)
    squared = found.noise.matrix.squared_sensitivity(3, S)
    assert 2.99 < get_epsilon(GaussianEvent(found.noise.multiplier / math.sqrt(squared)), 1e-5) <= 3.0


def test_a_ledger_is_saved_with_its_correlated_passes():
    ledger = Ledger(relation=Relation.ZERO_OUT)
    ledger.begin(PARTITION.event_for(BANDS.event, 1), 2)
    other = Ledger(relation=Relation.ZERO_OUT)
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other.event() == ledger.event() == CorrelatedEvent(2, S, BANDS.event)


@pytest.mark.parametrize("physical", [None, 2])
def test_both_doors_train_alike_whole_and_in_physical_batches(physical):
    engine, found = trained_at_the_papers_door(BandMF(7.0, BANDS.coefficients), physical=physical)
    step = step_of()
    loader = step.batches(DATA)
    for _ in range(2):
        for batch in loader:
            step(batch)
    assert torch.allclose(found, parameters(step), rtol=1e-12, atol=1e-12)
    assert engine.ledger.event() == step.ledger.event() == CorrelatedEvent(2, S, BANDS.event)
    _, independent = trained_at_the_papers_door(Gaussian(1.0), physical=physical)
    assert not torch.allclose(found, independent, atol=1e-3)
