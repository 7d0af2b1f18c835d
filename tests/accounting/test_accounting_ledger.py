"""The ledger: nothing is taken back, nothing is counted twice, and the budget stops a step before it is taken."""

from __future__ import annotations

import json

import pytest
from accounting_oracles import poisson

from privet.accounting import (
    Budget,
    ComposedEvent,
    GaussianEvent,
    Ledger,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    Phase,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    Unit,
    calibrate_noise_multiplier,
    get_epsilon,
)
from privet.errors import BudgetExceededError, ConfigurationError, LedgerError

STEP = PoissonEvent(0.01, GaussianEvent(1.0))
OTHER = PoissonEvent(0.02, GaussianEvent(1.2))


def begin_often(ledger):
    for _ in range(100_000):
        ledger.begin(STEP)


def test_an_empty_ledger_costs_nothing():
    assert Ledger().event() == NoEvent()
    assert Ledger().epsilon(1e-5) == 0.0
    assert Ledger().epsilon(0.0) == 0.0


def test_phases_are_run_length_encoded_and_cost_what_ran():
    ledger = Ledger()
    for _ in range(300):
        ledger.begin(STEP)
    ledger.begin(OTHER, 200)
    ledger.begin(STEP, 700)
    assert ledger.phases == (Phase(STEP, 300), Phase(OTHER, 200), Phase(STEP, 700))
    assert ledger.steps == 1200
    expected = ComposedEvent((SelfComposedEvent(STEP, 1000), SelfComposedEvent(OTHER, 200)))
    assert ledger.epsilon(1e-5) == pytest.approx(get_epsilon(expected, 1e-5), rel=1e-9)
    assert ledger.epsilon(1e-5, accountant="rdp") > ledger.epsilon(1e-5)
    assert ledger.epsilon(1e-5, relation=Relation.REPLACE_ONE) > ledger.epsilon(1e-5)


def test_passes_over_a_partition_are_one_phase():
    ledger = Ledger(relation=Relation.ZERO_OUT)
    for _ in range(4):
        ledger.begin(PartitionEvent(1, GaussianEvent(2.0)))
    assert ledger.event() == PartitionEvent(4, GaussianEvent(2.0))
    assert ledger.epsilon(1e-5) == pytest.approx(4.37718, rel=1e-5)


def test_a_phase_knows_its_whole_event_even_for_mechanisms_that_do_not_compose_by_step():
    assert Phase(PartitionEvent(2, GaussianEvent(1.0)), 3).whole() == PartitionEvent(6, GaussianEvent(1.0))
    assert Phase(STEP, 3).whole() == SelfComposedEvent(STEP, 3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_budget_stops_the_first_step_that_does_not_fit(accountant):
    ledger = Ledger(budget=Budget(1.0, 1e-5), accountant=accountant)
    with pytest.raises(BudgetExceededError, match=r"budget is ε = 1\. Nothing was begun"):
        begin_often(ledger)
    taken = ledger.steps
    assert ledger.epsilon(1e-5) <= 1.0
    assert get_epsilon(SelfComposedEvent(STEP, taken + 1), 1e-5, accountant=accountant) > 1.0 - 2e-4
    before = ledger.state_dict()
    with pytest.raises(BudgetExceededError):
        ledger.begin(STEP)
    with pytest.raises(BudgetExceededError):
        ledger.begin(NonPrivateEvent())
    assert ledger.state_dict() == before
    ledger.budget = Budget(2.0, 1e-5)
    ledger.begin(STEP)
    ledger.budget = Budget(0.5, 1e-5)
    with pytest.raises(BudgetExceededError):
        ledger.begin(STEP)


def test_a_budget_is_checked_for_counts_and_after_a_change_of_mechanism():
    ledger = Ledger(budget=Budget(2.0, 1e-5), accountant="rdp")
    with pytest.raises(BudgetExceededError):
        ledger.begin(STEP, 10**7)
    assert ledger.steps == 0
    ledger.begin(STEP, 10)
    with pytest.raises(BudgetExceededError):
        ledger.begin(GaussianEvent(0.5))
    assert ledger.phases == (Phase(STEP, 10),)


def test_a_ledger_survives_json_and_says_what_it_must():
    ledger = Ledger(relation=Relation.ZERO_OUT, unit=Unit.USER)
    ledger.begin(STEP, 3)
    ledger.mark("reproducible key")
    ledger.mark("reproducible key")
    state = json.loads(json.dumps(ledger.state_dict(), allow_nan=False))
    again = Ledger(relation=Relation.ZERO_OUT, unit=Unit.USER)
    again.load_state_dict(state)
    assert again.phases == ledger.phases
    assert again.marks == ("reproducible key",)
    with pytest.raises(LedgerError, match="under zero_out, user"):
        Ledger().load_state_dict(state)


def test_steps_begun_after_a_checkpoint_stay_billed():
    ledger = Ledger()
    ledger.begin(STEP, 100)
    checkpoint = ledger.state_dict()
    ledger.begin(STEP, 50)
    ledger.begin(OTHER, 5)
    ledger.load_state_dict(checkpoint)
    assert ledger.phases == (Phase(STEP, 150), Phase(OTHER, 5))


@pytest.mark.parametrize("other", [{"relation": Relation.REPLACE_ONE}, {"unit": Unit.USER}])
def test_ledgers_of_another_relation_or_unit_do_not_merge(other):
    ledger, stranger = Ledger(), Ledger(**other)
    stranger.begin(STEP)
    with pytest.raises(LedgerError, match=r"one relation and unit.*No accountant converts"):
        ledger.merge(stranger)
    assert ledger.steps == 0


def test_the_unit_is_said_with_the_ledger_and_with_its_epsilon():
    ledger = Ledger(unit=Unit.USER, budget=Budget(2.0, 1e-5), accountant="rdp")
    ledger.begin(STEP, 3)
    ledger.mark("reproducible key")
    assert repr(ledger) == (
        "<Ledger: 3 steps begun, add_or_remove_one, one user, accountant 'rdp', budget ε = 2 at δ = 1e-05>"
    )
    bound = ledger.epsilon_bounds(1e-5)
    assert bound.upper == ledger.epsilon(1e-5) > 0.0
    assert bound.notes[-2:] == (
        "one unit is one user, as the events are about; no accountant converts units",
        "reproducible key",
    )
    assert ledger.state_dict()["unit"] == "user"


GOOD = {"version": 1, "relation": "add_or_remove_one", "unit": "example", "marks": [], "phases": []}
NEW = {"version": 2, "relation": "add_or_remove_one", "unit": "example", "marks": [], "runs": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has the keys"),
        ({"version": True}, "reads ledgers of version 1 and 2, got True"),
        ({"phases": [{"event": STEP.to_dict(), "count": 0}]}, "phase 0 is damaged.*at least 1, got 0"),
        ({"phases": [{"event": STEP.to_dict(), "count": 1.5}]}, "phase 0 is damaged"),
        ({"phases": [{"event": STEP.to_dict(), "count": 1}, {"event": 3, "count": 1}]}, "phase 1 is damaged"),
        ({"phases": [{"event": STEP.to_dict()}]}, "exactly an event and a count"),
        ({"phases": "none"}, "phases must be a list"),
        ({"marks": [1]}, "marks must be a list of texts"),
        ({"extra": 1}, "has the keys"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    ledger = Ledger()
    ledger.begin(STEP)
    with pytest.raises(LedgerError, match=message):
        ledger.load_state_dict({**GOOD, **change})
    assert ledger.phases == (Phase(STEP, 1),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "reads ledgers of version 1 and 2, got 3"),
        ({"runs": []}, "runs must map"),
        ({"runs": {"": []}}, "runs must map"),
        ({"runs": {"a": [{"event": STEP.to_dict(), "count": 1}], "b": 3}}, "phases must be a list"),
        ({"phases": []}, "has the keys"),
        ({"relation": "zero_out"}, "under zero_out, example"),
        ({"unit": "user"}, r"under add_or_remove_one, user.*no accountant converts"),
    ],
)
def test_a_damaged_state_of_this_version_is_refused_and_changes_nothing(change, message):
    ledger = Ledger()
    ledger.begin(STEP)
    with pytest.raises(LedgerError, match=message):
        ledger.load_state_dict({**NEW, **change})
    assert ledger.phases == (Phase(STEP, 1),)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "3"])
def test_steps_that_are_not_whole_are_refused(count):
    with pytest.raises(ConfigurationError, match="count must be a whole number of at least 1"):
        Ledger().begin(STEP, count)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("rate", "steps", "epsilon"), [(0.01, 700, 2.0), (0.1, 333, 8.0)])
def test_a_calibrated_run_fits_its_budget_to_the_last_step(accountant, rate, steps, epsilon):
    found = calibrate_noise_multiplier(
        epsilon,
        1e-5,
        lambda sigma: poisson(sigma, rate, steps),
        accountant=accountant,
        relation=Relation.ZERO_OUT,
    )
    step = PoissonEvent(rate, GaussianEvent(found.value))
    ledger = Ledger(relation=Relation.ZERO_OUT, budget=Budget(epsilon, 1e-5), accountant=accountant)
    for _ in range(steps):
        ledger.begin(step)
    assert ledger.epsilon(1e-5) <= epsilon
    with pytest.raises(BudgetExceededError):
        ledger.begin(step, max(1, steps // 50))


def test_bad_budgets_are_refused():
    with pytest.raises(ConfigurationError, match="epsilon must be"):
        Budget(-1.0, 1e-5)
    with pytest.raises(ConfigurationError, match=r"delta must be a number in \[0, 1\]"):
        Budget(1.0, 2.0)


def test_a_running_ledger_answers_as_a_fresh_one_does():
    ledger = Ledger()
    ledger.begin(STEP, 1000)
    for steps in range(1001, 1010):
        ledger.begin(STEP)
        assert ledger.epsilon(1e-5) == pytest.approx(get_epsilon(poisson(1.0, 0.01, steps), 1e-5), rel=3e-4)
