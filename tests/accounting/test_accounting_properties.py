"""Laws that hold for every input, and edge cases where nothing may be nan, crash, or fail to be a bound."""

from __future__ import annotations

import itertools
import math

import pytest
from accounting_oracles import fixed, poisson, truncated
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    Event,
    FixedSizeEvent,
    GaussianEvent,
    GdpAccountant,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PldAccountant,
    PoissonEvent,
    RdpAccountant,
    Relation,
    SelfComposedEvent,
    get_accountant,
    get_delta,
    get_epsilon,
    known_accountants,
    register_accountant,
)
from privet.accounting.accountant import Accountant, Bound
from privet.errors import ConfigurationError

SIGMAS = st.floats(0.4, 20.0)
RATES = st.floats(1e-4, 0.9)
STEPS = st.integers(1, 3000)
DELTAS = st.floats(-12.0, -2.0).map(lambda exponent: 10.0**exponent)
quick = settings(max_examples=12, deadline=None)
NOISE = 1 + 4e-4  # both sides are upper bounds; this is how far above the truth they may lie


@pytest.mark.parametrize("accountant", [PldAccountant, RdpAccountant])
class TestMonotone:
    @quick
    @example(1.5, 1e-4, 607, 1e-7, 1.25)  # rare events, where Rényi's bound is loose by a factor of 40
    @given(SIGMAS, RATES, STEPS, DELTAS, st.floats(1.01, 3.0))
    def test_in_every_argument(self, accountant, sigma, rate, steps, delta, factor):  # noqa: PLR0917  fixtures
        ask = accountant().epsilon
        epsilon = ask(poisson(sigma, rate, steps), delta) * NOISE + 1e-6
        assert ask(poisson(sigma, rate / factor, steps), delta) <= epsilon
        assert ask(poisson(sigma, rate, max(1, int(steps / factor))), delta) <= epsilon
        assert ask(poisson(sigma * factor, rate, steps), delta) <= epsilon
        assert ask(poisson(sigma, rate, steps), min(1.0, delta * factor)) <= epsilon


@quick
@example(1.5, 1e-4, 485, 1e-7, [607, 520])
@example(1.5, 1e-4, 607, 1e-7, [400, 485])
@given(SIGMAS, st.floats(1e-5, 0.5), STEPS, DELTAS, st.lists(STEPS, max_size=3))
def test_a_finer_grid_says_the_same_whatever_was_asked_before(sigma, rate, steps, delta, before):
    asked = PldAccountant()
    for count in before:
        asked.epsilon(poisson(sigma, rate, count), delta)
    found = asked.epsilon(poisson(sigma, rate, steps), delta)
    assert found == pytest.approx(PldAccountant(tolerance=1e-6).epsilon(poisson(sigma, rate, steps), delta), 1e-3, 3e-5)


@quick
@given(SIGMAS, RATES, st.integers(2, 200), DELTAS)
def test_composing_is_counting_and_order_does_not_matter(sigma, rate, steps, delta):
    step, other = PoissonEvent(rate, GaussianEvent(sigma)), PoissonEvent(rate / 2, GaussianEvent(sigma + 1))
    for accountant in (PldAccountant, RdpAccountant):
        ask = accountant().epsilon
        counted = ask(SelfComposedEvent(step, steps), delta)
        assert ask(ComposedEvent((step,) * steps), delta) == pytest.approx(counted, rel=1e-9, abs=1e-9)
        nested = SelfComposedEvent(ComposedEvent((step, SelfComposedEvent(step, steps - 1))), 1)
        assert ask(nested, delta) == pytest.approx(counted, rel=1e-9, abs=1e-9)
        one = ask(ComposedEvent((SelfComposedEvent(step, steps), other)), delta)
        two = ask(ComposedEvent((other, SelfComposedEvent(step, steps))), delta)
        assert one == pytest.approx(two, rel=1e-9, abs=1e-9)


@quick
@given(SIGMAS, RATES, STEPS, DELTAS, st.sampled_from(list(Relation)))
def test_lower_is_at_most_upper_and_pld_at_most_renyi(sigma, rate, steps, delta, relation):
    event = poisson(sigma, rate, steps)
    bound = PldAccountant().epsilon_bounds(event, delta, relation=relation)
    assert 0.0 <= bound.lower <= bound.upper
    assert bound.upper <= RdpAccountant().epsilon(event, delta, relation=relation)
    assert bound.method == "pld" or bound.upper < 1e-3 or bound.upper == math.inf


@quick
@given(SIGMAS, RATES, STEPS, st.floats(0.05, 5.0))
def test_delta_of_epsilon_and_back(sigma, rate, steps, epsilon):
    event = poisson(sigma, rate, steps)
    bound = PldAccountant().delta_bounds(event, epsilon)
    assert 0.0 <= bound.lower <= bound.upper <= 1.0
    if 1e-12 < bound.upper < 0.1:
        assert PldAccountant().epsilon(event, bound.upper) == pytest.approx(epsilon, rel=5e-3, abs=2e-4)


@quick
@given(SIGMAS, DELTAS, st.integers(1, 50))
def test_rate_zero_and_one_are_exact(sigma, delta, steps):
    for name in ("pld", "rdp"):
        assert get_epsilon(poisson(sigma, 0.0, steps), delta, accountant=name) == 0.0
        plain = get_epsilon(SelfComposedEvent(GaussianEvent(sigma), steps), delta, accountant=name)
        assert get_epsilon(poisson(sigma, 1.0, steps), delta, accountant=name) == pytest.approx(plain, rel=1e-11)
        everybody = FixedSizeEvent(9, 9, GaussianEvent(sigma))
        alone = get_epsilon(GaussianEvent(sigma), delta, accountant=name)
        assert get_epsilon(everybody, delta, accountant=name, relation=Relation.ZERO_OUT) == alone
        # A batch of 9 has another record in the place of one that was added: that is a replacement.
        replaced = get_epsilon(GaussianEvent(sigma), delta, accountant=name, relation=Relation.REPLACE_ONE)
        assert get_epsilon(everybody, delta, accountant=name) == replaced


@quick
@given(SIGMAS, DELTAS)
def test_replacing_doubles_the_sensitivity(sigma, delta):
    for name in ("pld", "rdp"):
        doubled = get_epsilon(GaussianEvent(sigma / 2), delta, accountant=name)
        replaced = get_epsilon(GaussianEvent(sigma), delta, relation=Relation.REPLACE_ONE, accountant=name)
        assert replaced == pytest.approx(doubled, rel=1e-9)
        assert get_epsilon(GaussianEvent(sigma), delta, relation=Relation.ZERO_OUT, accountant=name) < replaced


@quick
@given(st.floats(0.3, 5.0), st.floats(1.0, 30.0))
def test_a_gradient_with_its_count_is_one_gaussian(sigma, count_noise):
    both = ClipCountEvent(sigma, count_noise)
    one = (sigma**-2 + (2 * count_noise) ** -2) ** -0.5
    assert get_epsilon(both, 1e-5) == pytest.approx(get_epsilon(GaussianEvent(one), 1e-5), rel=1e-9)
    sampled = get_epsilon(PoissonEvent(0.1, both), 1e-5)
    assert sampled == pytest.approx(get_epsilon(PoissonEvent(0.1, GaussianEvent(one)), 1e-5), rel=1e-9)


def test_the_noise_split_of_adaptive_clipping_costs_one_gaussian():
    # Andrew et al.: z = 1 and count noise 12.8 leave 1.000764 for the gradient; 0.6 leaves 1.809.
    for count_noise, gradient in [(12.8, 1.000764), (0.6, 1.809)]:
        assert get_epsilon(ClipCountEvent(gradient, count_noise), 1e-5) == pytest.approx(4.37718, rel=2e-3)


def test_passes_over_a_partition_are_participations():
    for passes in (1, 4, 9):
        expected = get_epsilon(GaussianEvent(2.0 / math.sqrt(passes)), 1e-5)
        assert get_epsilon(PartitionEvent(passes, GaussianEvent(2.0)), 1e-5) == pytest.approx(expected, rel=1e-9)


EDGE_DELTAS = (0.0, 1e-300, 1e-30, 1e-14, 1e-5, 0.5, 1.0)
EDGE_EVENTS = [
    poisson(sigma, rate, steps)
    for sigma, rate, steps in itertools.product((1e-3, 0.3, 1.0, 1e6), (1e-9, 0.01, 0.999), (1, 1000, 10**8))
]


@pytest.mark.parametrize("event", EDGE_EVENTS, ids=str)
def test_edges_give_a_number_that_falls_as_delta_grows(event):
    pld, rdp = PldAccountant(), RdpAccountant()
    last = math.inf
    for delta in EDGE_DELTAS:
        epsilon, renyi = pld.epsilon(event, delta), rdp.epsilon(event, delta)
        assert not math.isnan(epsilon)
        assert 0.0 <= epsilon <= min(renyi, last * NOISE)
        assert (epsilon == math.inf) == (delta == 0.0)
        last = epsilon
    assert epsilon == 0.0


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("sigma", [1e-3, 1e6])
def test_edges_of_every_sampler_and_relation(sigma, relation):
    for event in (poisson(sigma, 1e-9, 1000), fixed(sigma, 1, 1000, 1000), truncated(6, sigma, 1e-9, 1000)):
        accountant, last = PldAccountant(), math.inf
        for delta in (1e-300, 1e-30, 1e-5, 0.5):
            epsilon = accountant.epsilon(event, delta, relation=relation)
            assert 0.0 <= epsilon <= last * NOISE
            assert math.isfinite(epsilon)
            last = epsilon


@pytest.mark.parametrize("name", ["pld", "rdp", "gdp"])
class TestEnds:
    def test_nothing_costs_nothing(self, name):
        for event in (
            NoEvent(),
            ComposedEvent(()),
            SelfComposedEvent(GaussianEvent(1.0), 0),
            PartitionEvent(0, NoEvent()),
        ):
            assert get_epsilon(event, 0.0, accountant=name) == 0.0
            assert get_delta(event, 0.0, accountant=name) == 0.0

    def test_no_noise_is_infinite_and_says_so(self, name):
        for event in (GaussianEvent(0.0), poisson(0.0, 0.5, 3), fixed(0.0, 1, 2, 1), truncated(500, sigma=0.0)):
            bound = get_accountant(name).epsilon_bounds(event, 1e-5)
            assert bound.upper == math.inf
            assert any("σ = 0" in note for note in bound.notes)
            assert get_delta(event, 3.0, accountant=name) == 1.0

    def test_what_is_not_private_or_not_known_is_infinite(self, name):
        class Unheard(Event, kind=f"unheard_{name}"):
            pass

        for event in (NonPrivateEvent(), PoissonEvent(0.1, NonPrivateEvent()), Unheard(), PoissonEvent(0.1, Unheard())):
            assert get_epsilon(event, 1e-5, accountant=name) == math.inf
        assert any("Unheard" in n for n in get_accountant(name).epsilon_bounds(Unheard(), 1e-5).notes)

    def test_sampling_around_sampling_falls_back_and_says_so(self, name):
        inner = PoissonEvent(0.05, GaussianEvent(1.0))
        bound = get_accountant(name).epsilon_bounds(PoissonEvent(0.5, inner), 1e-5)
        assert bound.upper == pytest.approx(get_epsilon(inner, 1e-5, accountant=name), rel=1e-3)
        assert any("without its amplification" in note for note in bound.notes)

    @pytest.mark.parametrize("delta", [-1e-9, 1.1, math.nan, "x", None, True])
    def test_a_wrong_delta_is_refused_with_its_range(self, name, delta):
        with pytest.raises(ConfigurationError, match=r"delta must be a number in \[0, 1\]"):
            get_epsilon(GaussianEvent(1.0), delta, accountant=name)


def test_groups_where_no_mixture_applies_are_bounded_without_amplification():
    event = FixedSizeEvent(5, 100, GaussianEvent(3.0))
    bound = PldAccountant().epsilon_bounds(event, 1e-5, relation=Relation.REPLACE_ONE, group_size=3)
    assert bound.upper == pytest.approx(get_epsilon(GaussianEvent(3.0 / 6), 1e-5))
    assert any("without amplification" in note for note in bound.notes)


@pytest.mark.parametrize(
    ("event", "smallest", "mu"),
    [
        (poisson(9.4, 0.32768, 2000), 1e-9, 1.5692),
        (poisson(1.0, 0.01, 1000), None, None),
        (SelfComposedEvent(GaussianEvent(2.0), 9), 1e-9, 1.5),
    ],
)
def test_mu_covers_the_curve_and_no_smaller_one_does(event, smallest, mu):
    accountant = PldAccountant()
    floor = 1e-9 if smallest is None else smallest
    found = accountant.mu(event, smallest_delta=floor)
    if mu is not None:
        assert found == pytest.approx(mu, rel=1e-3)
    check_covers(event, found, floor)


def check_covers(event, mu, floor):
    from privet.accounting.gaussian import gaussian_delta, gaussian_mu

    accountant, needed = PldAccountant(), 0.0
    highest = accountant.epsilon(event, floor)
    for index in range(41):
        epsilon = highest * index / 40
        delta = accountant.delta(event, epsilon)
        assert gaussian_delta(mu, epsilon) >= delta * (1 - 1e-6), epsilon
        needed = max(needed, gaussian_mu(epsilon, delta))
    assert mu <= needed * 1.005


def test_the_gaussian_accountant_is_looser_than_the_curve_and_exact_for_gaussians():
    event = poisson(1.0, 0.01, 1000)
    assert GdpAccountant().epsilon(event, 1e-5) >= PldAccountant().epsilon(event, 1e-5)
    assert GdpAccountant().epsilon(GaussianEvent(1.0), 1e-5) == pytest.approx(4.37718, rel=1e-3)
    assert GdpAccountant().delta(event, 1.0) >= PldAccountant().delta(event, 1.0)


def test_true_positive_rates():
    from scipy.stats import norm

    gaussian = GaussianEvent(1.0)
    for rate in (1e-4, 1e-2, 0.1, 0.5):
        exact = norm.cdf(norm.ppf(rate) + 1.0)
        assert exact <= PldAccountant().true_positive_rate(gaussian, rate) <= exact * 1.02
    assert PldAccountant().true_positive_rate(NoEvent(), 0.1) == pytest.approx(0.1)
    assert PldAccountant().true_positive_rate(NonPrivateEvent(), 0.1) == 1.0


def test_an_accountant_of_ones_own_is_one_class_and_one_registration():
    class Doubled(Accountant):
        name = "doubled"

        def bound_epsilon(self, event, delta, *, relation, group_size, lower):
            found = RdpAccountant().bound_epsilon(event, delta, relation=relation, group_size=group_size, lower=lower)
            return Bound(2 * found.upper, 0.0, self.name, found.notes)

        def bound_delta(self, event, epsilon, *, relation, group_size, lower):
            return Bound(1.0, 0.0, self.name)

    register_accountant("doubled", Doubled)
    assert "doubled" in known_accountants()
    assert get_epsilon(GaussianEvent(1.0), 1e-5, accountant="doubled") == 2 * get_epsilon(
        GaussianEvent(1.0), 1e-5, accountant="rdp"
    )
    with pytest.raises(ConfigurationError, match=r"one of .*'pld'.*got 'prv'"):
        get_epsilon(GaussianEvent(1.0), 1e-5, accountant="prv")


def test_one_more_step_on_a_kept_grid_is_what_a_fresh_accountant_says():
    running = PldAccountant()
    for steps in (2000, 2001, 2002, 2100):
        kept = running.epsilon(poisson(1.0, 0.01, steps), 1e-5)
        assert kept == pytest.approx(PldAccountant().epsilon(poisson(1.0, 0.01, steps), 1e-5), rel=3e-4)
    mixed = ComposedEvent((poisson(1.0, 0.01, 2100), PoissonEvent(0.02, GaussianEvent(1.5))))
    assert running.epsilon(mixed, 1e-5) == pytest.approx(PldAccountant().epsilon(mixed, 1e-5), rel=3e-4)
