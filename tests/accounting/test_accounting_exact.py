"""Bounds against δ computed without any grid: closed forms for one step, an integral over the first outcome for two."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from accounting_oracles import composed_delta, one_step_delta, pair_delta, poisson
from scipy.stats import binom

from privet.accounting import (
    ComposedEvent,
    FixedSizeEvent,
    GaussianEvent,
    PldAccountant,
    PoissonEvent,
    RdpAccountant,
    Relation,
    TruncatedPoissonEvent,
)
from privet.accounting.blocks import block_lattice, refinement
from privet.accounting.composition import Composition
from privet.accounting.gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu
from privet.accounting.lattice import lattice_above, lattice_below, rare_lattice, usual_lattice
from privet.accounting.terms import Pair, Part, Term


def delta_of(lattice, step, epsilon):
    """Returns δ of a distribution on a grid."""
    losses = step * (lattice.first + np.arange(len(lattice.mass))) + lattice.offset
    return lattice.infinity + float(np.maximum(-np.expm1(epsilon - losses), 0.0) @ lattice.mass)


EPSILONS = (-2.0, -0.5, 0.0, 0.3, 1.0, 2.5, 4.0)


def check_one_step(lattice, step, exact, *, slack=1e-12):
    """δ of the grid is never below the exact one, and near it where the grid is fine."""
    for epsilon in EPSILONS:
        assert delta_of(lattice, step, epsilon) >= exact(epsilon) * (1 - slack) - 1e-15, epsilon


def check_one_step_below(lattice, step, exact, *, slack=1e-12):
    """δ of the grid is never above the exact one."""
    for epsilon in EPSILONS:
        assert delta_of(lattice, step, epsilon) <= exact(epsilon) * (1 + slack) + 1e-15, epsilon


def mixture(rate, sigma):
    return Term(((1.0, Part(Pair.MIXTURE, rate, sigma)),))


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.3, 0.7), (0.9, 2.0), (1e-4, 0.5)])
@pytest.mark.parametrize(("step", "tail"), [(0.1, 1e-3), (0.01, 1e-12)])
@pytest.mark.parametrize("forward", [True, False])
def test_a_grid_of_any_step_and_truncation_bounds_one_step(rate, sigma, step, tail, forward):
    def exact(epsilon):
        return one_step_delta(rate, sigma, epsilon, remove=forward)

    check_one_step(lattice_above(mixture(rate, sigma), step, tail, forward=forward), step, exact)
    check_one_step_below(lattice_below(mixture(rate, sigma), step, tail, forward=forward), step, exact)


def test_both_sides_of_a_fine_grid_are_near_the_truth():
    exact = one_step_delta(0.3, 0.7, 1.0)
    for lattice in (
        lattice_above(mixture(0.3, 0.7), 1e-3, 1e-12, forward=True),
        lattice_below(mixture(0.3, 0.7), 1e-3, 1e-12, forward=True),
    ):
        assert delta_of(lattice, 1e-3, 1.0) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("split", [0.2, 1.0])
@pytest.mark.parametrize("forward", [True, False])
def test_the_two_factors_of_a_step_bound_it(split, forward):
    """A draw of the usual and one of the rare factor, added up, lie above the step, and near it where rare is rare."""
    rate, sigma, step = 1e-3, 0.7, 0.01
    usual = usual_lattice(mixture(rate, sigma), step, 1e-12, split, forward=forward)
    rare = rare_lattice(mixture(rate, sigma), step, 1e-12, split, forward=forward)
    assert usual.mass.sum() == pytest.approx(1.0, abs=1e-12)
    assert rare.mass.sum() + rare.chance_of_none + rare.infinity == pytest.approx(1.0, abs=1e-12)
    usual_losses = step * (usual.first + np.arange(len(usual.mass)))
    assert usual_losses[usual.mass > 0.0].max() <= split + step
    alone = usual.mass * rare.chance_of_none
    rare_losses = step * (rare.first + np.arange(len(rare.mass)))
    for epsilon in (0.0, 0.1, 0.5, 1.5):
        both = np.maximum(-np.expm1(epsilon - usual_losses[:, None] - rare_losses), 0.0)
        found = rare.infinity + float(usual.mass @ both @ rare.mass)
        found += float(np.maximum(-np.expm1(epsilon - usual_losses), 0.0) @ alone)
        exact = one_step_delta(rate, sigma, epsilon, remove=forward)
        assert exact * (1 - 1e-12) - 1e-15 <= found
        if epsilon > 0.0 and forward:
            assert found <= exact * 1.02 + 1e-6


@pytest.mark.parametrize("pair", [Pair.MIXTURE, Pair.SYMMETRIC, Pair.REPLACE])
def test_nothing_is_lost_between_the_end_of_a_range_and_the_split(pair):
    """A term whose own losses end below the split, as beside a term with larger ones: its tail has to be kept."""
    term, step, tail, split = Term(((1.0, Part(pair, 0.3, 2.0)),)), 0.05, 1e-2, 8.0
    usual = usual_lattice(term, step, tail, split, forward=True)
    whole = lattice_above(term, step, 1e-12, forward=True)
    top = step * (usual.first + len(usual.mass) - 1)
    assert top == pytest.approx(split)
    assert usual.mass[-1] > 1e-4
    for epsilon in (0.5, 1.0, 1.5):
        # The rest of the whole lies above the split, and is less than 1e-12 here.
        assert delta_of(usual, step, epsilon) >= delta_of(whole, step, epsilon) * (1.0 - 1e-9)


def test_a_composition_that_is_interrupted_is_formed_anew(monkeypatch):
    """An exception in the middle of composing must not leave some terms in the sums and others not."""
    accountant, other = PldAccountant(), PoissonEvent(0.02, GaussianEvent(1.5))
    accountant.epsilon(poisson(1.0, 0.01, 2000), 1e-5)
    mixed = ComposedEvent((poisson(1.0, 0.01, 2300), other))
    whole, calls = Composition.add, []

    def add(self, spectrum, count):
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(self, spectrum, count)

    monkeypatch.setattr(Composition, "add", add)
    with pytest.raises(KeyboardInterrupt):
        accountant.epsilon(mixed, 1e-5)
    monkeypatch.undo()
    for event in (poisson(1.0, 0.01, 2000), mixed):
        assert accountant.epsilon(event, 1e-5) == pytest.approx(PldAccountant().epsilon(event, 1e-5), rel=3e-4)


@pytest.mark.parametrize("step", [0.1, 0.01])
def test_a_grid_bounds_groups_and_replacement(step):
    rate, sigma = 0.2, 0.8
    replace = ((0.8, 0.2), (0.0, 1.0)), ((0.8, 0.2), (0.0, -1.0)), sigma
    forward = lattice_above(Term(((1.0, Part(Pair.REPLACE, rate, sigma)),)), step, 1e-6, forward=True)
    check_one_step(forward, step, lambda epsilon: pair_delta(replace, epsilon), slack=1e-9)
    weights = tuple(binom.pmf(range(4), 3, rate))
    ahead, back = (weights, (0.0, 1.0, 2.0, 3.0)), ((1.0,), (0.0,))
    group = Term(((1.0, Part(Pair.GROUP, rate, sigma, 3)),))
    for side, laws in ((True, (ahead, back)), (False, (back, ahead))):
        above = lattice_above(group, step, 1e-6, forward=side)
        check_one_step(above, step, lambda epsilon, laws=laws: pair_delta((*laws, sigma), epsilon), slack=1e-9)
        below = lattice_below(group, step, 1e-6, forward=side)
        check_one_step_below(below, step, lambda epsilon, laws=laws: pair_delta((*laws, sigma), epsilon), slack=1e-9)


@pytest.mark.parametrize(("size", "steps"), [(4, 4), (16, 16), (64, 64)])
@pytest.mark.parametrize("forward", [True, False])
def test_a_block_of_steps_bounds_their_composition(size, steps, forward):
    """A block on the coarse grid against the same steps composed on a fine one by plain convolution."""
    rate, sigma, spacing, tilt = 0.2, 1.0, 0.05, 1.5
    ratio = refinement(size)
    fine = lattice_above(mixture(rate, sigma), spacing / ratio, 1e-12, forward=forward)
    block = block_lattice(fine, spacing, tilt, size, math.log(1e-6))
    # Plain: the untilted masses convolved one after the other.
    mass, first = np.ones(1), 0
    for _ in range(steps):
        mass, first = np.convolve(mass, fine.mass), first + fine.first
    losses = spacing / ratio * (first + np.arange(len(mass)))
    for epsilon in (0.2, 1.0, 3.0):
        exact = float(np.maximum(-np.expm1(epsilon - losses), 0.0) @ mass)
        found = delta_of(block, spacing, epsilon)
        assert exact * (1 - 1e-9) <= found, epsilon
        assert found <= exact * 1.05 + 1e-12, epsilon


@pytest.mark.parametrize(("sigma", "rate", "epsilon"), [(1.0, 0.1, 0.5), (0.6, 0.02, 2.0), (1.5, 0.5, 0.1)])
def test_two_steps_lie_between_the_bounds(sigma, rate, epsilon):
    mixed, plain = ((1 - rate, rate), (0.0, 1.0)), ((1.0,), (0.0,))
    exact = max(
        composed_delta(((mixed, plain, sigma), (mixed, plain, sigma)), epsilon),
        composed_delta(((plain, mixed, sigma), (plain, mixed, sigma)), epsilon),
    )
    bound = PldAccountant().delta_bounds(poisson(sigma, rate, 2), epsilon)
    assert bound.lower * (1 - 1e-6) <= exact <= bound.upper * (1 + 1e-6)
    assert bound.upper == pytest.approx(exact, rel=2e-3)


def test_different_steps_lie_between_the_bounds():
    one, two = (((0.9, 0.1), (0.0, 1.0)), ((1.0,), (0.0,)), 0.8), (((0.7, 0.3), (0.0, 1.0)), ((1.0,), (0.0,)), 2.0)
    exact = composed_delta((one, two), 1.0)
    event = ComposedEvent((PoissonEvent(0.1, GaussianEvent(0.8)), PoissonEvent(0.3, GaussianEvent(2.0))))
    bound = PldAccountant().delta_bounds(event, 1.0)
    assert bound.lower <= exact * (1 + 1e-6)
    assert exact <= bound.upper * (1 + 1e-6)
    assert bound.upper == pytest.approx(exact, rel=2e-3)


def batches_of(n, rate, cap, *, record_value, other_values):
    """Returns the law of the clipped sum (weights, shifts) of one truncated Poisson step: every subset enumerated."""
    values = [*other_values, *([] if record_value is None else [record_value])]
    weights: dict[float, float] = {}
    assert len(values) == n - (record_value is None)
    for size in range(len(values) + 1):
        for drawn in itertools.combinations(range(len(values)), size):
            chance = rate**size * (1 - rate) ** (len(values) - size)
            kept = list(itertools.combinations(drawn, min(cap, size)))
            for batch in kept:
                total = round(sum(values[index] for index in batch), 9)
                weights[total] = weights.get(total, 0.0) + chance / len(kept)
    return tuple(weights.values()), tuple(weights)


def numeric_delta(p_law, q_law, sigma, epsilon):
    """Returns δ of two mixtures by a fine Riemann sum; the loss need not be monotone."""
    x = np.linspace(min(*p_law[1], *q_law[1]) - 12 * sigma, max(*p_law[1], *q_law[1]) + 12 * sigma, 40_001)

    def density(law):
        z = (x[:, None] - np.array(law[1])) / sigma
        return (np.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))) @ np.array(law[0])

    return float(np.maximum(density(p_law) - math.exp(epsilon) * density(q_law), 0.0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("others", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("relation", list(Relation))
def test_truncated_poisson_bounds_every_enumerated_data_set(others, relation):
    n, rate, cap = 5, 0.4, 2
    event = TruncatedPoissonEvent(rate, cap, n, GaussianEvent(0.7))
    laws = {
        value: batches_of(n, rate, cap, record_value=value, other_values=[others] * (n - 1))
        for value in (None, 0.0, 1.0, -1.0)
    }
    pairs = {
        Relation.ADD_OR_REMOVE_ONE: [(1.0, None), (-1.0, None)],
        Relation.ZERO_OUT: [(1.0, 0.0), (-1.0, 0.0)],
        Relation.REPLACE_ONE: [(1.0, -1.0), (-1.0, 1.0)],
    }[relation]
    accountant = PldAccountant()
    for epsilon in (0.0, 0.5, 1.5, 3.0):
        bound = accountant.delta(event, epsilon, relation=relation)
        for first, second in pairs:
            for p, q in ((laws[first], laws[second]), (laws[second], laws[first])):
                assert numeric_delta(p, q, 0.7, epsilon) <= bound * (1 + 1e-6), (epsilon, first, second)


@pytest.mark.parametrize("others", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("relation", [Relation.ZERO_OUT, Relation.REPLACE_ONE])
def test_fixed_size_bounds_every_enumerated_data_set(others, relation):
    n, size, sigma = 6, 2, 0.8

    def law(value):
        values = [others] * (n - 1) + [value]
        found: dict[float, float] = {}
        chosen = list(itertools.combinations(range(n), size))
        for batch in chosen:
            total = sum(values[index] for index in batch)
            found[total] = found.get(total, 0.0) + 1 / len(chosen)
        return tuple(found.values()), tuple(found)

    first, second = (law(1.0), law(0.0)) if relation is Relation.ZERO_OUT else (law(1.0), law(-1.0))
    event = FixedSizeEvent(size, n, GaussianEvent(sigma))
    for epsilon in (0.0, 0.4, 1.0, 2.5):
        bound = PldAccountant().delta(event, epsilon, relation=relation)
        assert numeric_delta(first, second, sigma, epsilon) <= bound * (1 + 1e-6)
        assert numeric_delta(second, first, sigma, epsilon) <= bound * (1 + 1e-6)
    if relation is Relation.REPLACE_ONE and others == -1.0:
        # Tight here: the others sit where the replaced record may go.
        assert PldAccountant().delta(event, 1.0, relation=relation) == pytest.approx(
            numeric_delta(first, second, sigma, 1.0), rel=2e-2
        )


@pytest.mark.parametrize(
    ("mu", "delta", "epsilon"),
    [
        (0.5, 1e-5, 1.99309),
        (1, 1e-5, 4.37718),
        (2, 1e-5, 9.99726),
        (4, 1e-5, 24.38161),
        (0.5, 1e-6, 2.25408),
        (1, 1e-6, 4.88655),
        (2, 1e-6, 10.99715),
        (4, 1e-6, 26.35696),
        (1 / 3.7306316, 1e-5, 1.0),
        (1 / 0.6002291, 1e-5, 8.0),
        (1 / 36.3046904, 1e-6, 0.1),
        (1 / 0.6830440, 1e-10, 10.0),
        (1 / 4.2246789, 1e-6, 1.0),
    ],
)
def test_the_gaussian_mechanism(mu, delta, epsilon):
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=3e-6)
    assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=3e-6)
    assert gaussian_delta(mu, gaussian_epsilon(mu, delta)) <= delta * (1 + 1e-9)


@pytest.mark.parametrize("mu", [1e-9, 1e-5, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e-5, 0.5])
def test_the_gaussian_mechanism_against_forty_digits(mu, delta):
    import mpmath as mp

    with mp.workdps(60):
        m = mp.mpf(mu)

        def exact(e):
            return mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m)

        epsilon = gaussian_epsilon(mu, delta)
        assert exact(mp.mpf(epsilon)) <= delta * (1 + 1e-6)
        if epsilon > 0.0:
            # For tiny μ a closed-form bound replaces a difference that would be rounding.
            assert exact(mp.mpf(epsilon) * (1 - 1e-6)) >= delta * ((1 - 1e-3) if mu > 1e-6 else 0.9)


def test_renyi_is_never_below_pld_nor_below_the_truth():
    for rate, sigma in [(0.1, 1.0), (0.5, 2.0)]:
        for epsilon in (0.2, 1.0, 3.0):
            exact = max(one_step_delta(rate, sigma, epsilon), one_step_delta(rate, sigma, epsilon, remove=False))
            assert RdpAccountant().delta(PoissonEvent(rate, GaussianEvent(sigma)), epsilon) >= exact
