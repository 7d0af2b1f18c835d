"""The oracle is checked before it judges: closed forms, many digits, published tables, and bugs planted in it."""

from __future__ import annotations

import math

import mpmath as mp
import oracle
import oracle_contour
import oracle_laws
import pytest
from accounting_oracles import TABLE, composed_delta, one_step_delta, poisson
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_contour import Composition, one_direction, patience
from oracle_laws import POINT, Law, Pair, step

from privet.accounting import ComposedEvent, GaussianEvent, Relation


def bernoulli(rate, sigma):
    return Pair(Law((1.0 - rate, rate), (0.0, 1.0)), POINT, sigma)


def contour_at_many_digits(rate, sigma, steps, epsilon, *, c, reach, digits=25):
    """Returns δ by the same formula, with both integrals by mpmath."""
    with mp.workdps(digits):
        q, s, e = mp.mpf(rate), mp.mpf(sigma), mp.mpf(epsilon)

        def integrand(t):
            z = mp.mpc(c, t)
            ratio = lambda x: 1 - q + q * mp.exp((2 * x - 1) / (2 * s**2))  # noqa: E731
            density = lambda x: mp.exp(-(x**2) / (2 * s**2)) / (s * mp.sqrt(2 * mp.pi))  # noqa: E731
            moment = mp.quad(lambda x: density(x) * ratio(x) ** z, mp.linspace(-9 * s, c + 9 * s, 9), maxdegree=6)
            return mp.re(moment**steps * mp.exp(-(z - 1) * e) / (z * (z - 1)))

        return float(mp.quad(integrand, mp.linspace(0, reach, 5), maxdegree=5) / mp.pi)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("rate", "sigma", "steps", "epsilon", "c", "reach"),
    [(0.3, 1.0, 10, 2.0, 4.0, 14.0), (0.05, 2.0, 400, 1.0, 9.0, 30.0)],
)
def test_the_same_formula_at_many_digits(rate, sigma, steps, epsilon, c, reach):  # noqa: PLR0917  fixtures
    low, high = one_direction(Composition(0.0, ((step(bernoulli(rate, sigma)), steps),)), epsilon)
    assert low <= contour_at_many_digits(rate, sigma, steps, epsilon, c=c, reach=reach) * (1 + 1e-6)
    assert high >= contour_at_many_digits(rate, sigma, steps, epsilon, c=c, reach=reach) * (1 - 1e-6)
    assert high <= low * (1 + 1e-5)


@pytest.mark.deep
@settings(max_examples=6, deadline=None)
@given(st.floats(0.7, 5.0), st.floats(-1.5, -0.05), st.floats(0.2, 0.9))
def test_one_step_by_contour_is_the_closed_form(sigma, log_rate, share):
    """The oracle itself never integrates one step; here it must, to be compared."""
    rate = 10.0**log_rate
    epsilon = share * math.log1p(rate * math.expm1(2.5 / sigma + 0.5 / sigma**2))  # the loss 2.5 σ out
    pair = Composition(0.0, ((step(bernoulli(rate, sigma)), 1),))
    for composition, remove in ((pair, True), (pair.reversed(), False)):
        exact = one_step_delta(rate, sigma, epsilon, remove=remove)
        assert float(oracle.one_step(composition.steps[0][0].parts[0][1], epsilon)) == pytest.approx(exact, 1e-9, 1e-30)
        try:
            low, high = one_direction(composition, epsilon)
        except oracle_contour.UndecidedError:
            continue
        assert low <= exact * (1 + 1e-6) + 1e-20
        assert high >= exact * (1 - 1e-6)


@pytest.mark.parametrize("squared_mu", [0.04, 1.0, 25.0])
def test_steps_at_rate_one_are_a_gaussian(squared_mu):
    sampled = Composition(0.0, ((step(Pair(Law((1.0,), (1.0,)), POINT, (4 / squared_mu) ** 0.5)), 4),))
    for epsilon in (0.1 * squared_mu**0.5, 2.0 * squared_mu**0.5 + squared_mu / 2):
        exact = float(oracle.gaussian(squared_mu**0.5, epsilon))
        for low, high in (one_direction(sampled, epsilon), one_direction(Composition(squared_mu), epsilon)):
            assert exact == pytest.approx(low, rel=1e-5)
            assert exact == pytest.approx(high, rel=1e-5)


@pytest.mark.deep
@pytest.mark.parametrize(("first", "second"), [((0.3, 0.7), (0.1, 0.7)), ((0.9, 2.0), (0.01, 2.0))])
def test_two_different_steps_by_integrating_over_the_outcome_of_one(first, second):
    laws = [(((1 - q, q), (0.0, 1.0)), ((1.0,), (0.0,)), sigma) for q, sigma in (first, second)]
    pair = Composition(0.0, tuple((step(bernoulli(q, sigma)), 1) for q, sigma in (first, second)))
    for epsilon in (0.2, 1.0):
        low, high = one_direction(pair, epsilon)
        assert (low + high) / 2 == pytest.approx(composed_delta(laws, epsilon), rel=1e-4)
        swapped = [(q, p, sigma) for p, q, sigma in laws]
        low, high = one_direction(pair.reversed(), epsilon)
        assert (low + high) / 2 == pytest.approx(composed_delta(swapped, epsilon), rel=1e-4, abs=1e-12)


QUICK_ROWS = [row for row in TABLE if "Truncated" not in str(row[0])]


@pytest.mark.parametrize("row", QUICK_ROWS, ids=lambda row: f"{str(row[0])[-90:]}-{row[2].value}")
def test_published_tables(row):
    event, delta, relation, value, _ = row
    assert (
        oracle.delta(event, value * (1 + 2e-3), relation).high
        < delta
        < oracle.delta(event, value * (1 - 2e-3), relation).high
    )


@pytest.mark.deep
@pytest.mark.parametrize("row", [row for row in TABLE if "Truncated" in str(row[0])], ids=lambda row: str(row[3]))
def test_published_tables_of_cut_batches(row):
    event, delta, _, value, _ = row
    with patience(4e9):  # privet's own pair under add-or-remove-one is the published one
        found = [oracle.delta(event, value * (1 + d), Relation.ADD_OR_REMOVE_ONE).high for d in (2e-3, -2e-3)]
    assert found[0] < delta < found[1]


def test_groups_of_the_literature():
    """Charles et al., arXiv 2407.07737: σ = 1, q = 0.01, T = 1000, δ = 1e-5."""
    for size, value in ((2, 3.9791), (5, 11.6380)):
        found = oracle.delta(poisson(1.0, 0.01, 1000), value, Relation.ADD_OR_REMOVE_ONE, size)
        assert found.decided
        assert found.low == pytest.approx(1e-5, rel=1e-3)


CORNERS = [(sigma, rate, steps) for sigma in (1.0, 8.0, 50.0) for rate in (0.03, 1.0) for steps in (10_000, 10_000_000)]


@pytest.mark.parametrize("corner", CORNERS, ids=str)
def test_is_decided_where_steps_are_many_and_falls(corner):
    sigma, rate, steps = corner
    event = poisson(sigma, rate, steps)
    spread = rate * math.sqrt(steps * math.expm1(min(sigma**-2, 5.0)))
    last = oracle.Interval(1.0, 1.0)
    for epsilon in (spread**2 / 2 + 2 * spread, spread**2 / 2 + 5 * spread):
        found = oracle.delta(event, epsilon)
        assert found.decided or found.high < 1e-20, (epsilon, found)
        assert found.low <= last.high
        last = found


def test_epsilon_is_the_root():
    found = oracle.epsilon(GaussianEvent(1.0), 1e-5)
    assert found.low <= 4.377178 <= found.high * (1 + 1e-7)
    assert found.high <= found.low * (1 + 1e-5)


class TestBugsPlantedInTheOracle:
    EVENT = ComposedEvent((poisson(1.0, 0.01, 500), poisson(2.0, 0.02, 500), GaussianEvent(8.0)))

    def check(self):
        found = oracle.delta(self.EVENT, 1.68730)
        assert found.decided
        assert found.low == pytest.approx(1e-5, rel=2e-3)

    def test_none(self):
        self.check()

    def test_a_count_forgotten(self, monkeypatch):
        whole = oracle.floors
        fewer = lambda c: Composition(c.squared_mu, tuple((step, 1) for step, _ in c.steps))  # noqa: E731
        monkeypatch.setattr(oracle, "floors", lambda *given: [fewer(each) for each in whole(*given)])
        with pytest.raises(AssertionError):
            self.check()

    def test_tails_of_the_output_left_out(self, monkeypatch):
        monkeypatch.setattr(oracle_laws, "NEGLIGIBLE", 4.0)
        caches = (oracle_laws._all_nodes, oracle_laws._region)
        for each in caches:
            each.cache_clear()
        try:
            with pytest.raises(AssertionError):
                self.check()
        finally:
            for each in caches:
                each.cache_clear()

    def test_the_pole_at_zero_forgotten(self, monkeypatch):
        whole = oracle_contour.Line.log_integrand
        monkeypatch.setattr(oracle_contour.Line, "log_integrand", lambda line, e: whole(line, e) + math.log(line.c))
        with pytest.raises(AssertionError):
            self.check()
