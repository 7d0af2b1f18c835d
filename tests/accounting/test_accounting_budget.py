"""The budget: never overspent, never stopped early, and asked about seldom, whatever the accountant and the schedule.

The truth is a toy accountant whose ε is a known sum, so that the first step that does not fit is known exactly.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import (
    Accountant,
    Bound,
    Budget,
    ComposedEvent,
    GaussianEvent,
    Ledger,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    calibrate_noise_multiplier,
    get_epsilon,
)
from privet.accounting import budget as budget_module
from privet.accounting.budget import BudgetMeter
from privet.accounting.phases import composed
from privet.errors import AccountingError, BudgetExceededError


def cost(event):
    """Returns a cost that falls with noise, rises with the rate, and adds up."""
    if isinstance(event, ComposedEvent):
        return math.fsum(cost(each) for each in event.events)
    if isinstance(event, SelfComposedEvent):
        return event.count * cost(event.event)
    if isinstance(event, PoissonEvent):
        return event.rate**2 * cost(event.event)
    if isinstance(event, PartitionEvent):
        return event.passes * cost(event.event)
    return math.inf if isinstance(event, NonPrivateEvent) else event.noise_multiplier**-2.0


class Toy(Accountant):
    """ε is the root of the sum of costs, or the sum itself. It counts questions by how many events they are about."""

    name = "toy"

    def __init__(self, power=1.0):
        self.power = power
        self.asked = []

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        self.asked.append(len(event.events) if isinstance(event, ComposedEvent) else 1)
        return Bound(upper=cost(event) ** self.power, lower=0.0, method=self.name)

    def bound_delta(self, event, epsilon, *, relation, group_size, lower):
        return Bound(upper=1.0, lower=0.0, method=self.name)


def poisson(noise, rate=0.1):
    return PoissonEvent(rate, GaussianEvent(noise))


def run(ledger, events):
    """Begins the events in turn, and returns how many were begun before the budget stopped one."""
    for index, event in enumerate(events):
        try:
            ledger.begin(event)
        except BudgetExceededError:
            return index
    return len(events)


def fitting(events, epsilon, power):
    """Returns how many of the events fit, by adding up."""
    total = 0.0
    for index, event in enumerate(events):
        total += cost(event)
        if total**power > epsilon:
            return index
    return len(events)


EVENTS = st.one_of(
    st.builds(poisson, st.floats(0.5, 3.0), st.sampled_from([0.1, 0.2])),
    st.builds(GaussianEvent, st.floats(2.0, 9.0)),
    st.builds(lambda noise: PartitionEvent(1, GaussianEvent(noise)), st.floats(2.0, 9.0)),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(EVENTS, min_size=1, max_size=150), st.floats(0.05, 0.999), st.sampled_from([0.5, 1.0]))
def test_the_first_step_that_does_not_fit_is_the_one_that_is_stopped(events, share, power):
    epsilon = (share * sum(map(cost, events))) ** power
    ledger = Ledger(budget=Budget(epsilon, 1e-5), accountant=Toy(power))
    # A sum in another order may differ in the last digits, and so by the step that they decide.
    least, most = (fitting(events, epsilon * factor, power) for factor in (1.0 - 1e-9, 1.0 + 1e-9))
    assert least <= run(ledger, events) <= most


LENGTH = 1500
GENERATOR = random.Random(1)
RANDOM = [GENERATOR.uniform(0.8, 2.0) for _ in range(LENGTH)]
SCHEDULES = {
    "falling": [poisson(2.0 * 0.4 ** (i / LENGTH)) for i in range(LENGTH)],
    "rising": [poisson(0.8 * 2.5 ** (i / LENGTH)) for i in range(LENGTH)],
    "random": [poisson(noise) for noise in RANDOM],
    "cyclic": [poisson(1.0 + 0.4 * math.sin(i / 50.0) + 1e-6 * i) for i in range(LENGTH)],
    "rate and noise": [poisson(2.0 - i / LENGTH, 0.05 + 0.04 * i / LENGTH) for i in range(LENGTH)],
    "one event": [poisson(1.0)] * LENGTH,
    "two in turn": [poisson(1.0), poisson(1.3, 0.2)] * (LENGTH // 2),
    "two kinds in turn": [poisson(1.0), GaussianEvent(20.0)] * (LENGTH // 2),
}


@pytest.mark.parametrize("share", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_questions_are_few_and_those_about_the_whole_history_fewer(schedule, share):
    events, toy = SCHEDULES[schedule], Toy()
    epsilon = share * sum(map(cost, events)) * (1.0 + 1e-9)
    ledger = Ledger(budget=Budget(epsilon, 1e-5), accountant=toy)
    begun = run(ledger, events)
    assert begun == fitting(events, epsilon, 1.0)
    assert (begun == len(events)) == (share >= 1.0)
    assert len(toy.asked) <= 200
    assert sum(size > 300 for size in toy.asked) <= 15


def test_one_question_more_in_ten_times_as_many_steps():
    asked = []
    for steps in (1_000, 10_000):
        toy = Toy()
        events = [poisson(2.0 * 0.4 ** (i / steps)) for i in range(steps)]
        assert run(Ledger(budget=Budget(2.0 * sum(map(cost, events)), 1e-5), accountant=toy), events) == steps
        asked.append(len(toy.asked))
    assert asked[1] <= asked[0] + 12


def test_a_step_that_was_refused_is_no_sign_of_what_comes():
    toy = Toy()
    ledger = Ledger(budget=Budget(100.0, 1e-5), accountant=toy)
    for _ in range(20):
        ledger.begin(poisson(1.0))
        with pytest.raises(BudgetExceededError, match="would bring ε to inf"):
            ledger.begin(NonPrivateEvent())
    before = len(toy.asked)
    assert run(ledger, [poisson(1.0)] * 1000) == 1000
    assert len(toy.asked) <= before + 12


def test_steps_of_others_use_up_the_headroom():
    toy = Toy()
    event, other = poisson(1.0), GaussianEvent(2.0)
    meter, begun = BudgetMeter(Budget(1.0, 1e-5), toy, Relation.ZERO_OUT), {}
    for _ in range(40):
        meter.admit(event, 1, begun)
        begun[event] = begun.get(event, 0) + 1
    begun[other] = 2  # 0.5 of the 0.6 that is left
    meter.began(other, 2)
    begun[event] += 5  # and a half of the rest
    meter.began(event, 5)
    for _ in range(5):
        meter.admit(event, 1, begun)
        begun[event] += 1
    assert cost(composed(begun)) == pytest.approx(1.0)
    with pytest.raises(BudgetExceededError):
        meter.admit(event, 1, begun)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_that_is_no_number_stops_the_run(bad):
    class Broken(Toy):
        def bound_epsilon(self, event, delta, **options):
            return Bound(upper=bad, lower=0.0, method="broken")

    ledger = Ledger(budget=Budget(1.0, 1e-5), accountant=Broken())
    with pytest.raises(BudgetExceededError, match="would bring ε to inf"):
        ledger.begin(poisson(1.0))
    assert ledger.steps == 0


def test_an_accountant_that_cannot_look_far_ahead_still_decides_step_by_step():
    class Narrow(Toy):
        def bound_epsilon(self, event, delta, **options):
            if cost(event) > 0.505:
                raise AccountingError("too much for me")
            return super().bound_epsilon(event, delta, **options)

    ledger = Ledger(budget=Budget(1.0, 1e-5), accountant=Narrow())
    with pytest.raises(AccountingError):
        run(ledger, [poisson(1.0)] * 100)
    assert ledger.steps == 50


def test_the_step_that_decides_is_asked_with_the_accountants_best():
    class Rough(Toy):
        def epsilon_near(self, event, delta, limit, *, relation=Relation.ADD_OR_REMOVE_ONE):
            return cost(event)

        def bound_epsilon(self, event, delta, **options):
            return Bound(upper=1.1 * cost(event), lower=0.0, method="rough")

    events = [poisson(1.0 + 0.001 * i) for i in range(100)]
    epsilon = sum(map(cost, events)) * (1.0 + 1e-9)
    ledger = Ledger(budget=Budget(epsilon, 1e-5), accountant=Rough())
    assert run(ledger, events) == len(events)
    assert ledger.epsilon(1e-5) <= epsilon


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_calibrated_schedule_runs_to_its_last_step_and_no_further(accountant):
    def schedule(noise):
        return [PoissonEvent(0.02, GaussianEvent(noise * 0.7 ** (i / 40))) for i in range(40)]

    found = calibrate_noise_multiplier(
        1.0, 1e-5, lambda noise: ComposedEvent(tuple(schedule(noise))), accountant=accountant
    )
    events = schedule(found.value)
    ledger = Ledger(budget=Budget(1.0, 1e-5), accountant=accountant)
    assert run(ledger, [*events, events[-1]]) == len(events)
    assert get_epsilon(ledger.event(), 1e-5, accountant=accountant) <= 1.0 + 1e-4


CHANGING = [poisson(2.0)] * 300 + [poisson(0.5)] * 300
"""A schedule whose noise drops where much headroom is left."""


def rounded_up(monkeypatch):
    monkeypatch.setattr(budget_module, "coarser", lambda counts, width: {poisson(2.0): sum(counts.values())})


def never_used_up(monkeypatch):
    def covered(self, event, count):
        return any(left >= count and budget_module.dominates(e, event) for e, left in self._headroom.items())

    monkeypatch.setattr(BudgetMeter, "_covered", covered)


def final_no(monkeypatch):
    histories = BudgetMeter._histories
    monkeypatch.setattr(BudgetMeter, "_histories", lambda self, begun: [next(histories(self, begun))])


def all_covered(monkeypatch):
    monkeypatch.setattr(budget_module, "dominates", lambda one, other: True)


@pytest.mark.parametrize(
    ("plant", "events", "too_many"),
    [
        (rounded_up, SCHEDULES["falling"][::4], True),
        (never_used_up, [poisson(2.0)] * 600, True),
        (final_no, SCHEDULES["falling"][::4], False),
        (all_covered, CHANGING, True),
    ],
)
def test_planted_bugs_overspend_or_stop_early(monkeypatch, plant, events, too_many):
    epsilon = 0.3 * sum(map(cost, events))
    expected = fitting(events, epsilon, 1.0)
    assert run(Ledger(budget=Budget(epsilon, 1e-5), accountant=Toy()), events) == expected
    plant(monkeypatch)
    begun = run(Ledger(budget=Budget(epsilon, 1e-5), accountant=Toy()), events)
    assert begun > expected if too_many else begun < expected
