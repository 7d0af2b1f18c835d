"""Random allocation: its accountant against integration, Monte Carlo and exact moments; each check is seen to fail."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from privet.accounting import (
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    calibrate_noise_multiplier,
    get_accountant,
    get_delta,
    get_epsilon,
    repeated,
)
from privet.accounting.allocation import LossLaw, loss_law
from privet.accounting.allocation_renyi import _moments_of_inverse, allocation_cumulant
from privet.accounting.lattice import lattice_above, rare_lattice, usual_lattice
from privet.accounting.terms import reduce_event
from tests.accounting.oracle_allocation import (
    by_integration,
    given_others,
    interval,
    sums,
    two_passes,
    whole_order,
)

PLD, RDP = get_accountant("pld"), get_accountant("rdp")


def event(sigma: float, steps: int, passes: int = 1):
    return repeated(RandomAllocationEvent(steps, GaussianEvent(sigma)), passes)


def deltas(law: LossLaw, epsilon: float) -> tuple[float, float]:
    """δ of removal and of addition, read off a law."""
    removal = law.with_record @ -np.expm1(np.minimum(epsilon - law.losses - law.slack, 0.0))
    addition = law.mass @ -np.expm1(np.minimum(epsilon + law.losses - law.slack, 0.0))
    return law.infinite + float(removal), law.zero + float(addition)


def loose(law: LossLaw, sigma: float, steps: int, epsilons: list[float], slack: float = 1e-2) -> list[str]:
    """What is wrong with a law: it is below the truth somewhere, or far above."""
    wrong = []
    for epsilon in epsilons:
        truth = by_integration(sigma, steps, epsilon)
        for name, found, true in zip(("removal", "addition"), deltas(law, epsilon), truth, strict=True):
            if not true * (1 - 1e-9) <= found:
                wrong.append(f"{name} below at {epsilon}")
            if not found <= true * (1 + slack) + 1e-11:
                wrong.append(f"{name} above at {epsilon}")
    return wrong


@pytest.mark.parametrize(("sigma", "steps"), [(0.4, 2), (1.0, 2), (3.0, 2), (0.6, 3), (1.0, 3), (5.0, 3)])
def test_the_law_is_tight_and_never_below_numerical_integration(sigma, steps):
    epsilons = [0.0, 0.3 / sigma, 1.0 / sigma, 2.5 / sigma]
    assert loose(loss_law(sigma, steps, 1e-12), sigma, steps, epsilons) == []


def test_wrong_laws_are_rejected():
    law, epsilons = loss_law(1.0, 3, 1e-12), [0.0, 0.5, 2.0]
    assert loose(law, 1.0, 3, epsilons) == []
    moved = replace(law, losses=law.losses - 1e-3)
    assert any("below" in each for each in loose(moved, 1.0, 3, epsilons))
    narrower = replace(law, losses=law.losses * 0.999)
    assert any("below" in each for each in loose(narrower, 1.0, 3, epsilons))
    without_top = replace(law, mass=np.where(law.losses < 2.0, law.mass, 0.0))
    assert any("below" in each for each in loose(without_top, 1.0, 3, epsilons))
    wider = replace(law, losses=law.losses * 1.01)
    assert any("above" in each for each in loose(wider, 1.0, 3, epsilons))
    # Sums of rounded-down numbers, in the place of the spread that keeps the mean, fall below.
    assert any("below" in each for each in loose(replace(law, losses=law.losses - 0.01), 1.0, 3, epsilons))


@pytest.mark.parametrize(
    ("sigma", "steps", "epsilon", "samples"),
    [(1.0, 100, 0.5, 80_000), (0.7, 1000, 0.5, 12_000), (2.0, 37, 0.15, 40_000)],
)
def test_delta_of_one_pass_lies_in_the_interval_of_monte_carlo(sigma, steps, epsilon, samples):
    others = sums(np.random.default_rng(5), sigma, steps - 1, samples)
    removal, addition = given_others(others, sigma, steps, epsilon)
    low, high = interval(removal)
    found = PLD.delta(event(sigma, steps), epsilon)
    assert low <= found <= high * 1.01
    assert found >= interval(addition)[0]
    assert PLD.delta(event(sigma, steps + steps // 5), epsilon) < found * 0.9  # a few more steps are told apart


def test_two_passes_lie_in_the_interval_of_monte_carlo():
    sigma, steps, epsilon = 1.0, 10, 2.0
    low, high = interval(two_passes(np.random.default_rng(7), sigma, steps, epsilon, 100_000))
    found = PLD.delta(event(sigma, steps, 2), epsilon)
    assert low <= found <= high * 1.01
    assert PLD.delta(event(sigma, steps, 1), epsilon) < low
    assert PLD.delta(event(sigma, steps, 3), epsilon) > high


# ε of one pass, by a grid four times finer; the deviation of a Monte Carlo estimate agrees.
ONE_PASS = [
    (0.5, 1000, 1e-5, 3.1344, 4.2048),
    (0.7, 1000, 1e-5, 0.5840, 1.7222),
    (1.0, 1000, 1e-5, 0.1388, 0.6778),
    (0.5, 100, 1e-5, 5.3966, 6.2698),
    (1.0, 100, 1e-5, 0.6209, 1.1660),
    (0.4, 10_000, 1e-6, 5.2459, 6.4201),
]


@pytest.mark.parametrize(("sigma", "steps", "delta", "tight", "renyi"), [ONE_PASS[i] for i in (1, 3, 4)])
def test_one_pass_costs_less_than_poisson_and_than_no_amplification(sigma, steps, delta, tight, renyi):
    found = PLD.epsilon_bounds(event(sigma, steps), delta)
    assert tight <= found.upper <= tight * 1.0015
    assert 0.8 * tight < found.lower <= tight
    assert abs(RDP.epsilon(event(sigma, steps), delta) - renyi) < 2e-3
    poisson = SelfComposedEvent(PoissonEvent(1 / steps, GaussianEvent(sigma)), steps)
    assert found.upper < PLD.epsilon(poisson, delta) < PLD.epsilon(GaussianEvent(sigma), delta)


def test_one_step_is_the_gaussian_itself():
    for passes in (1, 4):
        assert get_epsilon(event(1.3, 1, passes), 1e-5) == get_epsilon(
            SelfComposedEvent(GaussianEvent(1.3), passes), 1e-5
        )


def test_epsilon_is_monotone():
    base = PLD.epsilon(event(1.0, 50, 3), 1e-5)
    assert PLD.epsilon(event(1.0, 60, 3), 1e-5) < base < PLD.epsilon(event(1.0, 40, 3), 1e-5)
    assert PLD.epsilon(event(1.1, 50, 3), 1e-5) < base < PLD.epsilon(event(0.9, 50, 3), 1e-5)
    assert PLD.epsilon(event(1.0, 50, 2), 1e-5) < base < PLD.epsilon(event(1.0, 50, 4), 1e-5)
    assert PLD.epsilon(event(1.0, 50, 3), 1e-6) > base > PLD.epsilon(event(1.0, 50, 3), 1e-4)
    assert base < RDP.epsilon(event(1.0, 50, 3), 1e-5)
    assert abs(get_delta(event(1.0, 50, 3), base) / 1e-5 - 1.0) < 0.01


def test_whole_orders_equal_the_sum_over_all_ways():
    for sigma, steps, order in ((1.0, 3, 4), (0.5, 2, 6), (2.0, 4, 3)):
        found = allocation_cumulant(sigma, steps, float(order))
        assert math.isclose(found, whole_order(sigma, steps, order), rel_tol=1e-7)
    # Exact values of one pass: methods of other authors, to seven digits.
    for order, rho in (
        (2, 0.00171681),
        (3, 0.00257773),
        (4, 0.00344038),
        (8, 0.00690906),
        (16, 1.09257),
        (32, 9.09224),
    ):
        assert math.isclose(allocation_cumulant(1.0, 1000, float(order)) / (order - 1), rho, rel_tol=1e-5)


def test_orders_between_whole_ones_lie_on_a_chord():
    low, high = allocation_cumulant(1.0, 10, 2.0), allocation_cumulant(1.0, 10, 3.0)
    assert math.isclose(allocation_cumulant(1.0, 10, 2.5), (low + high) / 2, rel_tol=1e-9)
    assert 0.0 < allocation_cumulant(1.0, 10, 1.01) < low
    assert allocation_cumulant(1.0, 10, 64.0) < allocation_cumulant(1.0, 10, 64.5) == 64.5 * 63.5 / 2


@pytest.mark.parametrize(("sigma", "steps"), [(0.7, 5), (1.0, 3), (2.0, 2)])
def test_moments_of_the_addition_are_those_of_samples(sigma, steps):
    """The other direction of Rényi's bound, by samples of 1 / X."""
    mean = sums(np.random.default_rng(3), sigma, steps, 400_000) / steps
    found = _moments_of_inverse(sigma, steps, 2.0)
    for power in (1, 2):
        low, high = interval(mean**-power)
        assert low < math.exp(found[power + 1]) < high


def test_what_is_not_amplified_says_so():
    passes = SelfComposedEvent(RandomAllocationEvent(10, GaussianEvent(2.0)), 3)
    plain = SelfComposedEvent(GaussianEvent(2.0), 3)
    for options in ({"relation": Relation.REPLACE_ONE}, {"group_size": 2}):
        bound = PLD.epsilon_bounds(passes, 1e-5, **options)
        assert bound.upper == PLD.epsilon(plain, 1e-5, **options)
        assert any("as if who is in which step were known" in note for note in bound.notes)
    tiny = reduce_event(RandomAllocationEvent(10, GaussianEvent(0.01)))
    assert tiny.squared_mu == pytest.approx(1e4)
    assert any("outside of" in note for note in tiny.notes)
    assert get_epsilon(RandomAllocationEvent(10, GaussianEvent(0.0)), 1e-5) == math.inf
    nested = PLD.epsilon_bounds(RandomAllocationEvent(10, PoissonEvent(0.1, GaussianEvent(1.0))), 1e-5)
    assert nested.upper == PLD.epsilon(PoissonEvent(0.1, GaussianEvent(1.0)), 1e-5)
    assert any("one participation" in note for note in nested.notes)


def test_zero_out_costs_what_add_or_remove_costs():
    one = event(1.0, 20)
    assert PLD.epsilon(one, 1e-5, relation=Relation.ZERO_OUT) == PLD.epsilon(one, 1e-5)


@pytest.mark.parametrize("forward", [True, False])
def test_the_usual_and_the_rare_losses_are_all_losses(forward):
    (term,) = reduce_event(event(0.6, 50)).terms
    step, split = 0.01, 1.0
    whole = lattice_above(term, step, 1e-12, forward=forward)
    usual = usual_lattice(term, step, 1e-12, split, forward=forward)
    rare = rare_lattice(term, step, 1e-12, split, forward=forward)
    law = loss_law(0.6, 50, 1e-12)
    assert whole.infinity == (law.infinite if forward else law.zero) > 0.0
    assert float(whole.mass.sum()) + whole.infinity == pytest.approx(1.0, abs=1e-8)
    assert rare.chance_of_none + float(rare.mass.sum()) + rare.infinity == pytest.approx(1.0, abs=1e-8)
    assert step * (usual.first + len(usual.mass) - 1) <= split + 1e-9
    assert float(usual.mass.sum()) == pytest.approx(1.0)
    above = step * (whole.first + np.arange(len(whole.mass))) > split + step / 2
    assert float(rare.mass.sum()) == pytest.approx(float(whole.mass[above].sum()), rel=0.1)


def test_noise_is_calibrated():
    found = calibrate_noise_multiplier(2.0, 1e-5, lambda sigma: event(sigma, 30, 2), tolerance=1e-3)
    assert PLD.epsilon(event(found.value, 30, 2), 1e-5) <= 2.0
    assert PLD.epsilon(event(found.value * 0.998, 30, 2), 1e-5) > 2.0


def test_the_rest_of_a_pass_is_not_amplified():
    one = RandomAllocationEvent(10, GaussianEvent(2.0))
    assert one.rest_of_pass() == PartitionEvent(1, GaussianEvent(2.0))
