"""Noise on a grid costs no more than what it is billed as: against sums over Z and Z², and integrals at 40 digits."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest

from privet.accounting import (
    DiscreteGaussianEvent,
    Event,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    get_accountant,
    get_delta,
    get_epsilon,
    repeated,
)
from privet.accounting.discrete import LEAST_SCALE, MOST_VALUES
from privet.errors import ConfigurationError

EPSILONS = (0.0, 0.1, 0.3, 0.7, 1.0, 1.7, 2.5, 4.0)
# Small grids, on which sums over all integers take no time. η is smaller than in the proof for a fine grid, with
# θ = 2.01 e^(-2π²η²) below 1e-12.
ETA = 1.2
SHIFTS = [(3.0, (2, 1)), (4.0, (1, 0)), (4.0, (3, 3)), (2.0, (1, 1))]


def masses(scale: float, shift: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns N_Z(0, s²) in two dimensions without and with a shift, on all points that matter."""
    reach = int(12 * scale) + max(map(abs, shift)) + 1
    z = np.arange(-reach, reach + 1)
    one = np.exp(-(z**2) / (2 * scale**2))
    one /= one.sum()
    moved = [np.exp(-((z - by) ** 2) / (2 * scale**2)) for by in shift]
    moved = [each / each.sum() for each in moved]
    return np.outer(one, one), np.outer(*moved)


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


def gaussian_of(scale: float, shift: tuple[int, int]) -> GaussianEvent:
    return GaussianEvent(math.sqrt(scale**2 - ETA**2) / math.hypot(*shift))


@pytest.mark.parametrize(("scale", "shift"), SHIFTS)
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_no_sum_over_the_plane_exceeds_the_gaussian_that_bounds_it(scale, shift, rate):
    without, moved = masses(scale, shift)
    drawn = (1 - rate) * without + rate * moved
    event: Event = gaussian_of(scale, shift) if rate == 1.0 else PoissonEvent(rate, gaussian_of(scale, shift))
    for epsilon in EPSILONS:
        found = max(hockey_stick(drawn, without, epsilon), hockey_stick(without, drawn, epsilon))
        assert found <= get_delta(event, epsilon, relation=Relation.ADD_OR_REMOVE_ONE) + 1e-11
    # And the bound is no empty one.
    at_zero = get_delta(event, 0.0, relation=Relation.ADD_OR_REMOVE_ONE)
    assert hockey_stick(drawn, without, 0.0) >= 0.75 * at_zero


def test_the_gaussian_of_the_same_deviation_is_no_bound():
    # On a coarse grid the discrete law can be less private than the continuous one: η is needed.
    worst = 0.0
    for scale, shift in SHIFTS:
        without, moved = masses(scale, shift)
        same = GaussianEvent(scale / math.hypot(*shift))
        worst = max(worst, *(hockey_stick(moved, without, e) / get_delta(same, e) for e in EPSILONS))
    assert worst > 1.0 + 1e-3


def test_two_dimensions_are_not_one():
    # The same norm of the shift, in one direction and in two: other distributions, none of which stands for all.
    along, moved_along = masses(3.0, (5, 0))
    across, moved_across = masses(3.0, (4, 3))
    apart = [abs(hockey_stick(moved_along, along, e) - hockey_stick(moved_across, across, e)) for e in EPSILONS]
    assert max(apart) > 1e-3


@pytest.mark.parametrize("eta", [0.5, 0.8])
def test_rounding_a_gaussian_at_random_gives_the_discrete_one(eta):
    # Step 2 of the proof, integrated: the mass of Z is that of the discrete Gaussian, within the factor claimed.
    scale, step = 3.0, 1e-3
    tau = math.sqrt(scale**2 - eta**2)
    theta = 2.01 * math.exp(-2 * math.pi**2 * eta**2)
    y = np.arange(-35.0, 35.0, step)  # the trapezoid rule converges exponentially here
    integers = np.arange(-48, 49)
    weights = np.exp(-((integers[:, None] - y) ** 2) / (2 * eta**2))
    density = np.exp(-(y**2) / (2 * tau**2)) / (tau * math.sqrt(2 * math.pi))
    found = (weights / weights.sum(0) * density).sum(1) * step
    exact = np.exp(-(integers**2) / (2 * scale**2))
    exact /= exact.sum()
    middle = np.abs(integers) <= 12
    apart = np.abs(found / exact - 1)[middle].max()
    assert 1e-12 < apart <= 2 * theta
    # The smoothing of what is claimed for the grid itself.
    assert mp.mpf("2.01") * mp.exp(-2 * mp.pi**2 * 64) < mp.mpf(10) ** -548


@pytest.mark.parametrize(("scale", "shift"), SHIFTS)
@pytest.mark.parametrize("order", [1.5, 2.0, 8.0])
def test_renyi_divergences_are_within_zero_concentrated_privacy(scale, shift, order):
    without, moved = masses(scale, shift)
    inside = (moved > 0) & (without > 0)
    total = float(np.exp(order * np.log(moved[inside]) + (1 - order) * np.log(without[inside])).sum())
    rho = (shift[0] ** 2 + shift[1] ** 2) / (2 * scale**2)
    assert math.log(total) / (order - 1) <= order * rho * (1 + 1e-9)


@pytest.mark.parametrize("noise", [2.0**-10, 0.3, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("sum_error", [0.0, 2.0**-10, 0.5])
def test_the_bound_holds_the_sensitivity_on_the_grid(noise, sum_error):
    event = DiscreteGaussianEvent(noise, sum_error)
    with mp.workdps(60):
        for scale in (LEAST_SCALE, 2 * LEAST_SCALE - 1):
            shift = (1 + mp.mpf(sum_error)) * scale / mp.mpf(noise) + mp.sqrt(MOST_VALUES)
            deviation = mp.sqrt(mp.mpf(scale) ** 2 - 64)
            assert mp.mpf(event.gaussian_multiplier) <= deviation / shift
    assert event.gaussian_multiplier >= noise / (1 + sum_error) * (1 - 1e-6 * (1 + noise))
    # zCDP with ρ = μ²/2 is what the Gaussian of the bound has, at least.
    rho = (1 / event.gaussian_multiplier) ** 2 / 2
    assert rho >= ((1 + sum_error) / noise) ** 2 / 2
    assert get_epsilon(event, 1e-6, accountant="rdp") <= rho + 2 * math.sqrt(rho * math.log(1e6))


@pytest.mark.parametrize(
    "around",
    [
        lambda event: event,
        lambda event: repeated(PoissonEvent(0.01, event), 300),
        lambda event: repeated(PartitionEvent(1, event), 3),
        lambda event: RandomAllocationEvent(20, event),
    ],
    ids=["once", "poisson", "partition", "allocation"],
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_what_is_billed_is_a_little_more_than_for_gaussian_noise(around, accountant):
    gaussian = get_epsilon(around(GaussianEvent(1.0)), 1e-5, accountant=accountant)
    assert gaussian < get_epsilon(around(DiscreteGaussianEvent(1.0, 2.0**-10)), 1e-5, accountant=accountant)
    assert get_epsilon(around(DiscreteGaussianEvent(1.0, 2.0**-10)), 1e-5, accountant=accountant) < gaussian * 1.005
    assert get_epsilon(around(DiscreteGaussianEvent(1.0, 0.0)), 1e-5, accountant=accountant) < gaussian * (1 + 1e-4)


def test_nobody_claims_a_lower_bound():
    pld = get_accountant("pld")
    for event in (DiscreteGaussianEvent(1.0, 0.0), repeated(PoissonEvent(0.1, DiscreteGaussianEvent(1.0, 0.0)), 5)):
        for bound in (
            pld.bound_epsilon(event, 1e-5, relation=Relation.ZERO_OUT, group_size=1, lower=True),
            pld.bound_delta(event, 1.0, relation=Relation.ZERO_OUT, group_size=1, lower=True),
        ):
            assert bound.lower == 0.0 < bound.upper


def test_an_event_without_noise_or_with_odd_numbers():
    assert get_epsilon(DiscreteGaussianEvent(0.0, 0.0), 1e-5) == math.inf
    assert get_epsilon(DiscreteGaussianEvent(1e-160, 0.0), 1e-5) == math.inf
    event = PoissonEvent(0.1, DiscreteGaussianEvent(1.1, 0.001))
    assert Event.from_dict(event.to_dict()) == event
    for wrong in ((-1.0, 0.0), (math.nan, 0.0), (1.0, -0.1), (1.0, math.nan), (1.0, math.inf)):
        with pytest.raises(ConfigurationError):
            DiscreteGaussianEvent(*wrong)
