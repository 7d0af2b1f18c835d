"""Tuning: the law of the number of trials, what is billed, what a trial may begin, and what is released."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep
from privet.accounting import (
    Budget,
    ComposedEvent,
    GaussianEvent,
    Ledger,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    get_epsilon,
)
from privet.errors import BudgetExceededError, ConfigurationError, LedgerError, ProtocolError
from privet.tuning import NegativeBinomialRuns, PoissonRuns, ScoreFrom, Trial, TrialLedger, select

RUN = GaussianEvent(4.0)
LAWS = [
    PoissonRuns(0.4),
    PoissonRuns(3.0),
    PoissonRuns(250.0),
    NegativeBinomialRuns(1.0, 0.2),
    NegativeBinomialRuns(0.0, 0.1),
    NegativeBinomialRuns(-0.5, 0.05),
    NegativeBinomialRuns(2.5, 0.4),
]


def probability(law, k):
    """Returns P(K = k), by gamma functions."""
    if isinstance(law, PoissonRuns):
        return math.exp(k * math.log(law.mean) - law.mean - math.lgamma(k + 1))
    gamma, eta = law.success, law.shape
    if k == 0:
        return 0.0
    if eta == 0.0:
        return (1 - gamma) ** k / (k * math.log(1 / gamma))
    rising = math.gamma(k + eta) / math.gamma(eta) / math.factorial(k) if k < 100 else 0.0
    return (1 - gamma) ** k * rising / (gamma**-eta - 1)


class Steady:
    """Uniform numbers that fill [0, 1) evenly, so that counts are probabilities."""

    def __init__(self, size):
        self.values = iter([(index + 0.5) / size for index in range(size)])

    def random(self):
        return next(self.values)


@pytest.mark.parametrize("law", [law for law in LAWS if law != PoissonRuns(250.0)])
def test_numbers_of_runs_have_the_law_that_is_billed(law):
    size = 20_000
    source = Steady(size)
    counts = Counter(law.draw(source) for _ in range(size))
    for k in range(25):
        assert counts[k] / size == pytest.approx(probability(law, k), abs=2 / size), k
    mean = sum(k * count for k, count in counts.items()) / size
    assert mean == pytest.approx(law.event(RUN).mean_runs, rel=0.01)


def test_a_large_mean_is_drawn_as_a_sum():
    source = random.Random(3)
    found = [PoissonRuns(1000.0).draw(source) for _ in range(2000)]
    mean = sum(found) / len(found)
    variance = sum((each - mean) ** 2 for each in found) / len(found)
    assert mean == pytest.approx(1000.0, abs=4 * math.sqrt(1000 / 2000))
    assert variance == pytest.approx(1000.0, rel=0.15)


@pytest.mark.parametrize("law", LAWS)
def test_a_uniform_number_near_one_ends(law):
    class Last:
        def random(self):
            return math.nextafter(1.0, 0.0)

    assert law.event(RUN).mean_runs < law.draw(Last()) < 10_000


def trial_of(scores, seen=None):
    """Returns a trial with the next score each time."""
    left = iter(scores)

    def trial(ledger):
        ledger.begin(RUN)
        if seen is not None:
            seen.append(ledger)
        score = next(left)
        return Trial(score, f"result {score}")

    return trial


class Fixed:
    """A law for tests: so many runs."""

    def __init__(self, count):
        self.count = count

    def event(self, run):
        return NegativeBinomialRuns(1.0, 0.5).event(run)

    def draw(self, source):
        return self.count


def chosen(trial, ledger=None, *, runs, run=RUN, **options):
    ledger = Ledger() if ledger is None else ledger
    return select(trial, runs=runs, run=run, ledger=ledger, score_from=ScoreFrom.RELEASED_AND_PUBLIC, **options)


def test_the_best_is_returned_and_the_whole_is_billed_before_the_first_trial():
    ledger, seen = Ledger(), []

    def trial(own):
        seen.append(ledger.phases)
        return trial_of([0.1 * len(seen)])(own)

    best = chosen(trial, ledger, runs=Fixed(4))
    assert best == Trial(pytest.approx(0.4), best.result)
    event = Fixed(4).event(RUN)
    assert all(phases[0].event == event and phases[0].count == 1 for phases in seen)
    assert len(seen) == 4
    assert ledger.steps == 1
    assert ledger.epsilon(1e-5) == get_epsilon(event, 1e-5)
    assert ledger.marks == ()


def test_the_number_of_trials_is_drawn_from_the_law_and_differs():
    counts = set()
    for _ in range(12):
        seen = []
        chosen(trial_of([0.0] * 1000, seen), runs=PoissonRuns(20.0))
        counts.add(len(seen))
    assert len(counts) > 2


def test_no_trial_at_all_is_an_outcome():
    assert chosen(trial_of([]), runs=Fixed(0)) is None


def test_a_score_that_is_no_number_is_the_worst_and_equal_ones_are_drawn():
    assert chosen(trial_of([math.nan, -5.0, math.nan]), runs=Fixed(3)).score == -5.0
    winners = set()
    for _ in range(40):
        names = iter("abc")

        def trial(ledger, names=names):
            ledger.begin(RUN)
            return Trial(1.0, next(names))

        winners.add(chosen(trial, runs=Fixed(3)).result)
    assert winners == {"a", "b", "c"}


@pytest.mark.parametrize("score_from", ["private", None, True])
def test_a_score_of_unknown_origin_is_refused_before_anything_is_billed(score_from):
    ledger = Ledger()
    with pytest.raises(ConfigurationError, match="without noise has no bound"):
        select(trial_of([1.0]), runs=Fixed(1), run=RUN, ledger=ledger, score_from=score_from)
    with pytest.raises(TypeError, match="score_from"):
        select(trial_of([1.0]), runs=Fixed(1), run=RUN, ledger=ledger)
    assert ledger.steps == 0


def test_a_budget_is_asked_for_the_whole_selection():
    ledger = Ledger(budget=Budget(epsilon=0.9 * get_epsilon(Fixed(1).event(RUN), 1e-5), delta=1e-5))
    with pytest.raises(BudgetExceededError):
        chosen(trial_of([1.0]), ledger, runs=Fixed(1))
    assert ledger.steps == 0


def test_a_trial_that_breaks_leaves_the_bill_and_a_mark():
    def trial(ledger):
        ledger.begin(RUN)
        raise KeyboardInterrupt

    ledger = Ledger()
    with pytest.raises(KeyboardInterrupt):
        chosen(trial, ledger, runs=Fixed(2))
    assert ledger.steps == 1
    assert "broken off" in ledger.marks[0]


@pytest.mark.parametrize(
    ("trial", "error", "message"),
    [
        (lambda ledger: Trial(1.0, None), ProtocolError, "began nothing"),
        (lambda ledger: ledger.begin(RUN), ConfigurationError, "must return a Trial"),
        (lambda ledger: ledger.begin(RUN) or Trial("good", None), ConfigurationError, "number as its score"),
        (lambda ledger: ledger.begin(RUN, 2), BudgetExceededError, "are not left"),
        (lambda ledger: ledger.begin(GaussianEvent(3.9)), BudgetExceededError, "are not left"),
    ],
)
def test_a_trial_that_does_not_do_what_was_declared_is_stopped(trial, error, message):
    with pytest.raises(error, match=message):
        chosen(trial, runs=Fixed(1))


def test_a_seed_repeats_the_number_of_trials_and_is_marked():
    found = []
    for _ in range(2):
        ledger, seen = Ledger(), []
        chosen(trial_of([0.0] * 500, seen), ledger, runs=PoissonRuns(30.0), seed=5)
        found.append(len(seen))
        assert ledger.marks == ("reproducible key",)
    assert found[0] == found[1]


def test_a_trials_ledger_gives_what_was_declared_step_by_step():
    step, better = PoissonEvent(0.1, GaussianEvent(1.0)), PoissonEvent(0.05, GaussianEvent(1.5))
    run = ComposedEvent((SelfComposedEvent(step, 3), PartitionEvent(2, RUN), NoEvent()))
    parent = Ledger(relation=Relation.ZERO_OUT)
    ledger = TrialLedger(run, parent)
    assert (ledger.relation, ledger.unit) == (parent.relation, parent.unit)
    ledger.begin(step)
    ledger.begin(better, 2)  # less of a rate and more noise may stand in the place of a step
    ledger.begin(PartitionEvent(1, RUN))
    with pytest.raises(BudgetExceededError):
        ledger.begin(better)
    with pytest.raises(BudgetExceededError):
        ledger.begin(PartitionEvent(2, RUN))
    assert ledger.steps == 4
    ledger.begin(PartitionEvent(1, GaussianEvent(5.0)))
    ledger.mark("batches left out")
    assert parent.marks == ("batches left out",)
    assert parent.steps == 0
    with pytest.raises(LedgerError, match="takes no steps from another"):
        ledger.load_state_dict(Ledger(relation=Relation.ZERO_OUT).state_dict())


def test_a_release_without_protection_in_a_trial_reaches_the_ledger_that_pays():
    def trial(own):
        own.begin(RUN)
        own.begin(NonPrivateEvent())
        return Trial(1.0, None)

    ledger = Ledger(budget=Budget(epsilon=100.0, delta=1e-5))
    chosen(trial, ledger, runs=Fixed(2))
    assert ledger.epsilon(1e-5) == math.inf
    assert ledger.budget == Budget(epsilon=100.0, delta=1e-5)


def test_training_is_selected_at_the_explicit_door():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    rates = random.Random(1)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    mechanism = Mechanism(sampling=Poisson(rate=0.25), clipping=Flat(1.0), noise=Gaussian(multiplier=2.0), steps=4)

    def trial(ledger):
        model, rate = nn.Linear(3, 2), rates.choice([0.01, 0.1, 1.0])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        step = PrivateStep(model, optimizer=optimizer, mechanism=mechanism, loss_per_example=loss, ledger=ledger)
        for batch in step.batches(data):
            step(batch)
        return Trial(-float(model.weight.detach().norm()), (rate, model))

    ledger = Ledger(relation=Relation.ZERO_OUT)
    best = chosen(trial, ledger, runs=NegativeBinomialRuns(1.0, 0.5), run=mechanism.event())
    assert best.result[0] in (0.01, 0.1, 1.0)
    assert ledger.steps == 1
    assert ledger.epsilon(1e-3) > mechanism.epsilon(1e-3)
