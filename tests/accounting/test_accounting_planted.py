"""Each accountant fails its own tests when a bug is planted: the tests can see what they are there to see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from accounting_oracles import TABLE, check_table, one_step_delta, poisson, renyi_by_quadrature
from test_accounting_exact import check_one_step
from test_accounting_properties import check_covers

import privet.accounting.gaussian as gaussian_module
import privet.accounting.grid as grid_module
import privet.accounting.lattice as lattice_module
import privet.accounting.moments as moments_module
import privet.accounting.pairs as pairs_module
import privet.accounting.planning as planning_module
import privet.accounting.pld as pld_module
import privet.accounting.renyi as renyi_module
import privet.accounting.terms as terms_module
from privet.accounting import PldAccountant, Relation
from privet.accounting import _special as special
from privet.accounting.composition import Composition
from privet.accounting.terms import Pair, Part, Term

POISSON = TABLE[0]
PLAIN_REPLACED = next(row for row in TABLE if row[2] is Relation.REPLACE_ONE and row[3] == 9.99726)
FIXED_SIZE = next(row for row in TABLE if row[3] == 14.8207)
TRUNCATED = next(row for row in TABLE if row[3] == 1.92987)
MIXTURE = Term(((1.0, Part(Pair.MIXTURE, 0.3, 0.7)),))


def fails(check, *arguments):
    with pytest.raises(AssertionError):
        check(*arguments)


def test_nothing_planted_nothing_found():
    for row in (POISSON, PLAIN_REPLACED, FIXED_SIZE, TRUNCATED):
        check_table([row])
    check_series()
    check_truncation()


def test_one_direction_only(monkeypatch):
    whole = grid_module.Grid.read

    def read(self, counts):
        found = whole(self, counts)
        return found and [found[-1]] * len(found)

    monkeypatch.setattr(grid_module.Grid, "read", read)
    fails(check_table, [POISSON])


def test_both_directions_are_composed(monkeypatch):
    """With the laws exchanged at the source the first direction is the small one: only the maximum saves the bound."""
    whole = lattice_module.lattice_above

    def exchanged(term, step, tail, *, forward, tilt=0.0):
        return whole(term, step, tail, forward=not forward, tilt=tilt)

    places = pld_module.laws
    monkeypatch.setattr(grid_module, "lattice_above", exchanged)
    monkeypatch.setattr(pld_module, "laws", lambda *given, **named: places(*given, **named)[::-1])
    check_table([POISSON])


def check_series():
    for rate, sigma, order in [(0.3, 2.0, 1.05), (0.1, 3.0, 1.5), (0.5, 1.0, 2.3)]:
        found = renyi_module.mixture_cumulant(np.array([rate]), np.array([sigma]), order)[0] / (order - 1)
        exact = renyi_by_quadrature(rate, sigma, order)
        assert exact * (1 - 1e-12) <= found <= exact * (1 + 2e-9)


def test_the_sign_dropped_in_the_series(monkeypatch):
    monkeypatch.setattr(special, "gammasgn", np.ones_like, raising=False)
    fails(check_series)


def test_the_count_forgotten_in_composition(monkeypatch):
    whole = Composition.add
    monkeypatch.setattr(Composition, "add", lambda self, spectrum, count: whole(self, spectrum, min(count, 1)))
    fails(check_table, [POISSON])


def test_the_count_forgotten_in_renyis_sum(monkeypatch):
    whole = renyi_module.Cumulant.__init__

    def init(self, reduced):
        whole(self, reduced)
        self._count = np.ones_like(self._count)

    monkeypatch.setattr(renyi_module.Cumulant, "__init__", init)
    fails(check_table, [POISSON])


def test_a_sensitivity_of_one_instead_of_two(monkeypatch):
    whole = terms_module._Reduction.__init__

    def init(self, relation, group_size):
        whole(self, relation, group_size)
        self.shift = group_size

    monkeypatch.setattr(terms_module._Reduction, "__init__", init)
    fails(check_table, [PLAIN_REPLACED])


def test_a_shift_of_one_instead_of_two_without_replacement(monkeypatch):
    whole = pairs_module.mixtures

    def mixtures(part):
        doubled = dataclasses.replace(part, noise_multiplier=2 * part.noise_multiplier)
        return whole(doubled if part.pair is Pair.SYMMETRIC else part)

    for module in (pairs_module, planning_module, moments_module):
        monkeypatch.setattr(module, "mixtures", mixtures)
    fails(check_table, [FIXED_SIZE])


def test_the_remove_direction_alone_under_replace_one(monkeypatch):
    whole = terms_module._Reduction.term

    def term(self, parts, count, **others):
        remove = [
            (w, dataclasses.replace(p, pair=Pair.MIXTURE, noise_multiplier=p.noise_multiplier / 2)) for w, p in parts
        ]
        whole(self, remove, count, **others)

    monkeypatch.setattr(terms_module._Reduction, "term", term)
    fails(check_table, [FIXED_SIZE])


def check_truncation():
    step = 0.05
    forward = lattice_module.lattice_above(MIXTURE, step, 1e-3, forward=True)
    check_one_step(forward, step, lambda epsilon: one_step_delta(0.3, 0.7, epsilon))


def test_the_truncation_mass_dropped(monkeypatch):
    whole = lattice_module._spread
    monkeypatch.setattr(
        lattice_module,
        "_spread",
        lambda table, step, **others: dataclasses.replace(whole(table, step, **others), infinity=0.0),
    )
    fails(check_truncation)


def test_the_case_of_a_full_batch_dropped(monkeypatch):
    def truncated(self, event, multiplier):
        yield 1.0, self.poisson(event.rate, multiplier)

    monkeypatch.setattr(terms_module._Reduction, "truncated", truncated)
    fails(check_table, [TRUNCATED])


def test_dots_rounded_down_instead_of_connected(monkeypatch):
    monkeypatch.setattr(lattice_module, "_shares", lambda p, q, rounding, losses, step: np.zeros_like(p))
    fails(check_truncation)


@pytest.mark.parametrize("planted", ["clt", "one_point"])
def test_a_mu_that_does_not_cover(monkeypatch, planted):
    rate, sigma, steps = 0.001, 0.5, 1000
    event = poisson(sigma, rate, steps)
    clt = rate * np.sqrt(steps * np.expm1(1 / sigma**2))

    def smallest_mu(delta, highest):
        return clt if planted == "clt" else gaussian_module.gaussian_mu(0.0, delta(0.0))

    mu = PldAccountant().mu(event, smallest_delta=1e-9)
    check_covers(event, mu, 1e-9)
    monkeypatch.setattr("privet.accounting.accountant.smallest_mu", smallest_mu)
    fails(check_covers, event, PldAccountant().mu(event, smallest_delta=1e-9), 1e-9)
