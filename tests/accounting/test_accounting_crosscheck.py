"""Against two public accountants, where they are installed: `scripts/crosscheck-accounting` sets that up and runs this.

They are things to compare with, not oracles: the tables and the exact integrals decide.
"""

from __future__ import annotations

import pytest
from accounting_oracles import HETEROGENEOUS, poisson

from privet.accounting import PldAccountant, RdpAccountant, Relation

GRID = [
    (1.0, 0.01, 1000, 1e-5),
    (1.0, 0.01, 10000, 1e-5),
    (0.7, 0.001, 5000, 1e-6),
    (0.5, 0.02, 200, 1e-7),
    (2.0, 0.2, 300, 1e-5),
    (4.0, 0.5, 2000, 1e-6),
    (10.0, 0.1, 1000, 1e-6),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), GRID)
@pytest.mark.parametrize("relation", [Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE])
def test_dp_accounting(sigma, rate, steps, delta, relation):
    pytest.importorskip("dp_accounting", reason="scripts/crosscheck-accounting installs it in its own environment")
    from dp_accounting import dp_event, pld, privacy_accountant

    theirs = {
        Relation.ADD_OR_REMOVE_ONE: privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE,
        Relation.REPLACE_ONE: privacy_accountant.NeighboringRelation.REPLACE_ONE,
    }[relation]
    accountant = pld.PLDAccountant(neighboring_relation=theirs)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    accountant.compose(event, steps)
    expected = accountant.get_epsilon(delta)
    bound = PldAccountant().epsilon_bounds(poisson(sigma, rate, steps), delta, relation=relation)
    assert bound.lower <= expected
    # Their grid is 1e-4 wide, whatever the loss; where they are looser we may be below.
    assert expected * (1 - 5e-3) <= bound.upper <= expected * (1 + 1e-3)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), GRID)
def test_dp_accounting_renyi(sigma, rate, steps, delta):
    pytest.importorskip("dp_accounting", reason="scripts/crosscheck-accounting installs it in its own environment")
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    expected = accountant.get_epsilon(delta)
    assert expected * 0.98 <= RdpAccountant().epsilon(poisson(sigma, rate, steps), delta) <= expected * (1 + 1e-6)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), GRID)
def test_prv_accountant(sigma, rate, steps, delta):
    prv = pytest.importorskip("prv_accountant", reason="scripts/crosscheck-accounting installs it")
    mechanism = prv.PoissonSubsampledGaussianMechanism(noise_multiplier=sigma, sampling_probability=rate)
    accountant = prv.PRVAccountant(
        prvs=[mechanism], max_self_compositions=[steps], eps_error=0.01, delta_error=delta / 1e3
    )
    low, estimate, high = accountant.compute_epsilon(delta=delta, num_self_compositions=[steps])
    bound = PldAccountant().epsilon_bounds(poisson(sigma, rate, steps), delta)
    assert low <= bound.upper <= high
    assert bound.lower <= high
    assert bound.upper == pytest.approx(estimate, rel=1e-3, abs=1e-3)


def test_dp_accounting_heterogeneous():
    pytest.importorskip("dp_accounting", reason="scripts/crosscheck-accounting installs it in its own environment")
    from dp_accounting import dp_event, pld

    accountant = pld.PLDAccountant()
    for sigma, rate, steps in [(1.0, 0.01, 500), (2.0, 0.02, 500)]:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    accountant.compose(dp_event.GaussianDpEvent(8.0))
    assert PldAccountant().epsilon(HETEROGENEOUS, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
