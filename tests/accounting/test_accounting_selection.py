"""Selections: the best of a random number of runs, against brute force over small laws and against an attack."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest

from privet.accounting import (
    Accountant,
    Bound,
    Budget,
    ComposedEvent,
    Event,
    FileLedger,
    GaussianEvent,
    Ledger,
    NegativeBinomialSelectionEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    PoissonSelectionEvent,
    Relation,
    SelfComposedEvent,
    get_accountant,
    get_epsilon,
)
from privet.accounting.selected import profile_shift, selection_cumulant
from privet.errors import BudgetExceededError, ConfigurationError

RUN = GaussianEvent(4.0)
SELECTIONS = [
    PoissonSelectionEvent(0.3, RUN),
    PoissonSelectionEvent(10.0, RUN),
    NegativeBinomialSelectionEvent(1.0, 0.1, RUN),
    NegativeBinomialSelectionEvent(0.0, 0.03, RUN),
    NegativeBinomialSelectionEvent(-0.5, 0.01, RUN),
    NegativeBinomialSelectionEvent(3.0, 0.2, RUN),
]


def generating(selection, x):
    """Returns E[x^K], by the closed forms of the paper's section 3, in numbers of mpmath."""
    if isinstance(selection, PoissonSelectionEvent):
        return mpmath.exp(selection.mean * (x - 1))
    gamma, eta = mpmath.mpf(selection.success), mpmath.mpf(selection.shape)
    if eta == 0:
        return mpmath.log(1 - (1 - gamma) * x) / mpmath.log(gamma)
    return ((1 - (1 - gamma) * x) ** -eta - 1) / (gamma**-eta - 1)


def best_of(selection, law):
    """Returns the law of the release: that there was no run first, then the outcomes from worst to best."""
    below, found = mpmath.mpf(0), [generating(selection, mpmath.mpf(0))]
    for chance in law:
        found.append(generating(selection, below + chance) - generating(selection, below))
        below += chance
    return found


def renyi(p, q, order):
    return mpmath.log(mpmath.fsum(a**order * b ** (1 - order) for a, b in zip(p, q, strict=True) if a > 0))


def hockey_stick(p, q, epsilon):
    both = zip(p, q, strict=True)
    return mpmath.fsum(max(a - mpmath.exp(epsilon) * b, mpmath.mpf(0)) for a, b in both)


def pairs():
    """Yields pairs of neighboring laws of one run over a few outcomes, ordered by score."""
    random = np.random.default_rng(7)
    for size, spread in [(2, 0.3), (3, 0.5), (5, 1.0), (9, 0.2)]:
        p = random.dirichlet(np.ones(size))
        q = p * np.exp(random.uniform(-spread, spread, size))
        yield [mpmath.mpf(each) for each in p / p.sum()], [mpmath.mpf(each) for each in q / q.sum()]


def worst_pair(epsilon):
    """Returns a pure ε-private pair in which a selection does the most: the middle has more, the top has less."""
    top, middle = mpmath.mpf("1e-3"), mpmath.mpf("1e-7")
    p = [1 - top - middle, middle, top]
    q = [
        1 - top * mpmath.exp(epsilon) - middle * mpmath.exp(-epsilon),
        middle / mpmath.exp(epsilon),
        top * mpmath.exp(epsilon),
    ]
    return p, q


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_mean_and_the_law_are_those_of_the_paper(selection):
    derivative = mpmath.diff(lambda x: generating(selection, x), 1)
    assert selection.mean_runs == pytest.approx(float(derivative), rel=1e-9)
    if isinstance(selection, NegativeBinomialSelectionEvent):
        weights = [
            (1 - selection.success) ** k * math.prod((i + selection.shape) / (i + 1) for i in range(1, k))
            for k in range(1, 2000)
        ]  # the factor at i = 0 is the same for every k
        mean = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights)
        assert selection.mean_runs == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("order", [1.3, 2.0, 5.0, 17.0])
def test_no_pair_of_small_laws_exceeds_the_bound_by_renyi_divergences(selection, order):
    orders = [1.1, 1.5, 2.0, 4.0, 9.0, 30.0, 100.0]
    for p, q in pairs():
        bound = selection_cumulant(selection, lambda a, p=p, q=q: float(max(renyi(p, q, a), renyi(q, p, a))), orders)
        a, b = best_of(selection, p), best_of(selection, q)
        assert float(max(renyi(a, b, order), renyi(b, a, order))) <= bound(order)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_pair_of_small_laws_exceeds_the_bound_by_the_profile(selection):
    for p, q in [*pairs(), worst_pair(mpmath.mpf("0.4"))]:

        def profile(epsilon, p=p, q=q):
            return float(max(hockey_stick(p, q, epsilon), hockey_stick(q, p, epsilon)))

        shift = profile_shift(selection, profile)
        a, b = best_of(selection, p), best_of(selection, q)
        for more in (0.0, 0.01, 0.1, 0.3, 1.0):
            truth = float(max(hockey_stick(a, b, shift + more), hockey_stick(b, a, shift + more)))
            assert truth <= selection.mean_runs * profile(more) * (1 + 1e-12)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 1.0, 4.0])
def test_a_pure_mechanism_needs_two_plus_shape_times_its_epsilon_and_the_bounds_say_so(shape):
    # Corollary 3 of the paper. The pair attains it in the limit, so that a smaller bound would be wrong.
    epsilon, selection = 0.5, NegativeBinomialSelectionEvent(shape, 1e-9, RUN)
    p, q = worst_pair(mpmath.mpf(epsilon))
    with mpmath.workdps(60):
        a, b = best_of(selection, p), best_of(selection, q)
        truth = max(abs(float(mpmath.log(x / y))) for x, y in zip(a[1:], b[1:], strict=True))
    orders = [2.0**k for k in range(1, 30)]
    cumulant = selection_cumulant(selection, lambda order: (order - 1.0) * epsilon, orders)
    bound = cumulant(1e8) / (1e8 - 1.0)
    assert bound == pytest.approx((2.0 + shape) * epsilon, rel=1e-5)
    assert (2.0 + shape) * epsilon * 0.98 < truth <= bound
    shift = profile_shift(selection, lambda each: max(0.0, math.expm1(epsilon - each)) / (1.0 + math.exp(epsilon)))
    assert epsilon + shift <= bound * 1.01


@pytest.mark.parametrize(("rho", "mean"), [(0.03, 10), (0.5, 3), (0.001, 100)])
def test_concentrated_mechanisms_have_the_closed_forms_of_the_theorems(rho, mean):
    base, orders = (lambda order: rho * order * (order - 1.0)), (1.0 + 2.0 ** np.arange(-6.0, 14.0, 0.05)).tolist()
    gamma = 1.0 / mean  # the geometric law; the best order of theorem 2 is √(log(1/γ) / ρ)
    cumulant = selection_cumulant(NegativeBinomialSelectionEvent(1.0, gamma, RUN), base, orders)
    for order in (1.5, 4.0, 20.0):
        known = rho * order + math.log(mean) / (order - 1) + 2 * (2 * math.sqrt(rho * math.log(mean)) - rho)
        assert known * (1 - 1e-9) <= cumulant(order) / (order - 1) <= known * 1.001
    poisson = selection_cumulant(PoissonSelectionEvent(float(mean), RUN), base, orders)
    for order in (1.5, 4.0, 20.0):
        epsilon = math.log1p(1 / (order - 1))
        logs = [base(a) - (a - 1) * epsilon + (a - 1) * math.log1p(-1 / a) - math.log(a) for a in orders]
        delta = math.exp(min(0.0, *logs))
        paper = rho * order + mean * delta + math.log(mean) / (order - 1)
        known = np.logaddexp(-mean, (order - 1) * paper)  # no run at all is an outcome, too
        assert known * (1 - 1e-9) <= poisson(order) <= known * 1.001


def attack(selection, sigma, epsilon):
    """Returns δ at ε of runs whose score is their released number: N(0, σ²), or N(±1, σ²) with the example there."""
    x = np.linspace(-12 * sigma, 12 * sigma, 40_000)
    width = x[1] - x[0]

    def release(shift):
        from scipy.special import ndtr

        edges = np.concatenate([x - width / 2, [x[-1] + width / 2]])
        values = np.array([float(generating(selection, mpmath.mpf(c))) for c in ndtr((edges[::80] - shift) / sigma)])
        return np.diff(values)

    found = 0.0
    for shift in (1.0, -1.0):
        p, q = release(shift), release(0.0)
        for one, other in ((p, q), (q, p)):
            found = max(found, float(np.maximum(one - math.exp(epsilon) * other, 0.0).sum()))
    return found


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_attack_on_the_released_best_stays_below_every_accountants_bound(selection):
    for name in ("rdp", "pld"):
        accountant = get_accountant(name)
        for epsilon in (0.0, 0.2, 0.5, 1.0):
            bound = accountant.delta(selection, epsilon)
            assert attack(selection, 4.0, epsilon) <= bound <= 1.0
            assert accountant.epsilon(selection, min(1.0, bound * 1.001)) <= epsilon + 1e-3
    # The bound is of use: ε of the attack is more than a third of it.
    assert attack(selection, 4.0, get_epsilon(selection, 1e-3) / 3.0) > 1e-3


def test_more_runs_less_noise_and_more_selections_are_never_more_private():
    for name in ("rdp", "pld"):
        ask = get_accountant(name).epsilon
        by_mean = [ask(PoissonSelectionEvent(mean, RUN), 1e-6) for mean in (0.1, 1.0, 10.0, 100.0)]
        by_success = [ask(NegativeBinomialSelectionEvent(1.0, g, RUN), 1e-6) for g in (0.9, 0.5, 0.1, 0.01)]
        by_noise = [ask(PoissonSelectionEvent(5.0, GaussianEvent(s)), 1e-6) for s in (9.0, 5.0, 2.0, 1.0)]
        by_count = [ask(SelfComposedEvent(SELECTIONS[2], count), 1e-6) for count in (1, 2, 5, 20)]
        for values in (by_mean, by_success, by_noise, by_count):
            assert values == sorted(values)
            assert values[0] < values[-1] < math.inf


def test_what_lies_beside_a_selection_adds_to_it_and_bounds_it_from_below():
    step = SelfComposedEvent(PoissonEvent(0.01, GaussianEvent(1.0)), 300)
    both = ComposedEvent((SelfComposedEvent(ComposedEvent((SELECTIONS[1],)), 1), step))
    for name in ("rdp", "pld"):
        accountant = get_accountant(name)
        bound = accountant.epsilon_bounds(both, 1e-5)
        assert bound.upper > accountant.epsilon(SELECTIONS[1], 1e-5)
        assert 0.0 < bound.lower <= accountant.epsilon(step, 1e-5) < bound.upper
        assert any("best of a random number of runs" in note for note in bound.notes)
        assert accountant.delta(both, bound.upper * 1.001) <= 1e-5


def test_nothing_beside_a_selection_leaves_it_the_tighter_bound():
    alone = get_epsilon(SELECTIONS[2], 1e-5)
    for nothing in (NoEvent(), SelfComposedEvent(RUN, 0), ComposedEvent(())):
        assert get_epsilon(ComposedEvent((nothing, SELECTIONS[2])), 1e-5) == alone
    assert alone < 0.8 * get_epsilon(SELECTIONS[2], 1e-5, accountant="rdp")


def test_the_relation_and_the_size_of_a_group_reach_the_run_inside():
    replaced = PoissonSelectionEvent(10.0, GaussianEvent(2.0))
    for name in ("rdp", "pld"):
        ask = get_accountant(name).epsilon
        assert ask(SELECTIONS[1], 1e-5, relation=Relation.REPLACE_ONE) == pytest.approx(ask(replaced, 1e-5), rel=1e-9)
        assert ask(SELECTIONS[1], 1e-5, group_size=2) == pytest.approx(ask(replaced, 1e-5), rel=1e-9)


def test_the_edges():
    for name in ("rdp", "pld"):
        accountant = get_accountant(name)
        assert accountant.epsilon(PoissonSelectionEvent(5.0, NonPrivateEvent()), 1e-5) == math.inf
        assert accountant.delta(PoissonSelectionEvent(5.0, GaussianEvent(0.0)), 3.0) == 1.0
        assert accountant.epsilon(PoissonSelectionEvent(5.0, NoEvent()), 1e-5) < 1e-3
        assert accountant.epsilon(SELECTIONS[0], 0.0) == math.inf
        assert accountant.epsilon(SELECTIONS[0], 1.0) == 0.0
        nested = PoissonSelectionEvent(3.0, PoissonSelectionEvent(3.0, RUN))
        assert accountant.epsilon(PoissonSelectionEvent(3.0, RUN), 1e-5) < accountant.epsilon(nested, 1e-5) < math.inf
        # Sampling around a selection, and passes of it, have no bound here; nor has "gdp" any for a selection.
        assert accountant.epsilon(PoissonEvent(0.1, SELECTIONS[0]), 1e-5) == math.inf
        assert accountant.epsilon(PartitionEvent(2, SELECTIONS[0]), 1e-5) == math.inf
    assert get_epsilon(SELECTIONS[0], 1e-5, accountant="gdp") == math.inf


def test_one_number_for_the_curve_and_the_power_of_an_attack():
    accountant = get_accountant("pld")
    mu = accountant.mu(SELECTIONS[2])
    assert accountant.mu(RUN) < mu < 3.0
    power = accountant.true_positive_rate(SELECTIONS[2], 0.01)
    assert accountant.true_positive_rate(RUN, 0.01) < power < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoissonSelectionEvent(0.0, RUN), "mean must be"),
        (lambda: PoissonSelectionEvent(math.inf, RUN), "mean must be"),
        (lambda: PoissonSelectionEvent(1.0, 4.0), "event must be an Event"),
        (lambda: NegativeBinomialSelectionEvent(-1.0, 0.1, RUN), "above -1"),
        (lambda: NegativeBinomialSelectionEvent(math.nan, 0.1, RUN), "above -1"),
        (lambda: NegativeBinomialSelectionEvent(True, 0.1, RUN), "above -1"),
        (lambda: NegativeBinomialSelectionEvent(1.0, 1.0, RUN), "below 1"),
        (lambda: NegativeBinomialSelectionEvent(1.0, 1e-200, RUN), "below 1"),
    ],
)
def test_a_selection_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_ledgers_states_and_files_keep_a_selection(selection, tmp_path):
    assert Event.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection
    ledger, shared = Ledger(), FileLedger(tmp_path / "shared.ledger")
    for each in (ledger, shared):
        each.begin(selection)
        each.begin(PoissonEvent(0.01, GaussianEvent(2.0)), 10)
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    reopened = FileLedger(tmp_path / "shared.ledger")
    assert ledger.epsilon(1e-5) == again.epsilon(1e-5) == reopened.epsilon(1e-5) > 0.0


def test_a_budget_refuses_the_selection_that_would_exceed_it():
    ledger = Ledger(budget=Budget(epsilon=3.0, delta=1e-5))
    ledger.begin(SELECTIONS[1])
    with pytest.raises(BudgetExceededError):
        ledger.begin(SELECTIONS[1])
    assert ledger.steps == 1


class OfItsOwn(Event, kind="of_its_own_in_a_test"):
    """An event that the library does not know."""


class Knows(Accountant):
    """Knows the event above, whose ε is 1."""

    name = "knows"

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        return Bound(1.0, 0.0, self.name)

    def bound_delta(self, event, epsilon, *, relation, group_size, lower):
        return Bound(0.0 if epsilon >= 1.0 else 0.5 * (1.0 - epsilon), 0.0, self.name)


def test_mu_of_an_event_that_only_the_accountant_knows_is_not_zero():
    # The Gaussian without amplification knew nothing of the event, and was taken for a bound: μ came out as 0.
    assert Knows().mu(OfItsOwn()) > 0.5
