"""Runs are told apart by their ids: whatever is saved, loaded, merged, copied or forked, no step is lost.

The model keeps the set of steps that were really begun: every step has a number of its own, and every ledger and
state has the set of steps that it should know of. Counts must equal the sizes of those sets.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import FileLedger, GaussianEvent, Ledger, Phase, PoissonEvent
from privet.accounting import record as record_module
from privet.errors import LedgerError

STEP = PoissonEvent(0.01, GaussianEvent(1.0))
OTHER = PoissonEvent(0.02, GaussianEvent(1.2))
EVENTS = (STEP, OTHER)


def counts(ledger):
    return tuple(sum(phase.count for phase in ledger.phases if phase.event == event) for event in EVENTS)


def test_the_checkpoint_of_another_run_is_added():
    ledger, other = Ledger(), Ledger()
    ledger.begin(STEP, 3)
    other.begin(STEP, 10)
    ledger.load_state_dict(other.state_dict())
    assert ledger.steps == 13


def test_an_earlier_state_of_the_same_run_changes_nothing_and_loading_twice_adds_once():
    ledger = Ledger()
    ledger.begin(STEP, 5)
    early = ledger.state_dict()
    ledger.begin(STEP, 5)
    ledger.load_state_dict(early)
    assert ledger.steps == 10
    other = Ledger()
    for state in (early, ledger.state_dict(), early):
        other.load_state_dict(state)
    assert other.steps == 10


def test_two_runs_that_continue_one_checkpoint_merge_to_the_sum_of_both():
    first = Ledger()
    first.begin(STEP, 5)
    saved = json.loads(json.dumps(first.state_dict()))
    first.begin(STEP, 2)
    resumed = Ledger()
    resumed.load_state_dict(saved)
    resumed.begin(STEP, 4)
    assert resumed.steps == 9
    resumed.merge(first)
    resumed.merge(first)
    first.merge(resumed)
    assert first.steps == resumed.steps == 5 + 2 + 4


def test_what_is_begun_after_a_load_stands_after_what_was_loaded():
    ledger, other = Ledger(), Ledger()
    ledger.begin(STEP)
    other.begin(OTHER)
    ledger.merge(other)
    ledger.begin(STEP, 2)
    assert ledger.phases == (Phase(STEP, 1), Phase(OTHER, 1), Phase(STEP, 2))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ledger: pickle.loads(pickle.dumps(ledger))])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_copies_and_pickles_go_on_as_runs_of_their_own(tmp_path, duplicate, kind):
    ledger = Ledger() if kind == "memory" else FileLedger(tmp_path / "ledger", block=3)
    ledger.begin(STEP, 3)
    other = duplicate(ledger)
    assert other.run != ledger.run
    ledger.begin(STEP, 3)
    other.begin(STEP, 6)
    ledger.merge(other)
    assert ledger.steps == 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_goes_on_as_a_run_of_its_own(tmp_path, kind):
    ledger = Ledger() if kind == "memory" else FileLedger(tmp_path / "ledger", block=3)
    ledger.begin(STEP, 2)
    child = os.fork()
    if child == 0:
        try:
            ledger.begin(STEP, 1)
            (tmp_path / "state").write_text(json.dumps(ledger.state_dict()))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread = threading.Thread(target=ledger.begin, args=(STEP, 1), daemon=True)  # the fork has let go of the lock
    thread.start()
    thread.join(30.0)
    assert not thread.is_alive()
    ledger.load_state_dict(json.loads((tmp_path / "state").read_text()))
    if kind == "memory":
        assert ledger.steps == 4
    else:  # the block of three that the parent reserved is the parent's alone
        assert ledger.steps == 6


def test_a_run_on_record_in_two_ways_is_refused_and_changes_nothing():
    ledger, bad = Ledger(), Ledger()
    ledger.begin(STEP, 3)
    state = ledger.state_dict()
    state["runs"] = {run: [{"event": OTHER.to_dict(), "count": 9}] for run in state["runs"]}
    state["runs"] = {"another": [{"event": OTHER.to_dict(), "count": 1}], **state["runs"]}
    with pytest.raises(LedgerError, match=r"on record in two ways.*one writer for each run"):
        ledger.load_state_dict(state)
    assert ledger.phases == (Phase(STEP, 3),)
    fewer = [{"event": STEP.to_dict(), "count": 2}, {"event": OTHER.to_dict(), "count": 1}]
    with pytest.raises(LedgerError, match="on record in two ways"):
        ledger.load_state_dict({**state, "runs": {ledger.run: fewer}})
    assert ledger.phases == (Phase(STEP, 3),)
    bad.load_state_dict(state)
    with pytest.raises(LedgerError, match="on record in two ways"):
        bad.merge(ledger)


def test_a_state_of_version_1_is_another_run_each_time():
    state = {
        "version": 1,
        "relation": "add_or_remove_one",
        "unit": "example",
        "marks": ["reproducible key"],
        "phases": [{"event": STEP.to_dict(), "count": 10}],
    }
    ledger = Ledger()
    ledger.begin(STEP, 3)
    ledger.load_state_dict(state)
    assert (ledger.steps, ledger.marks) == (13, ("reproducible key",))
    saved = ledger.state_dict()
    ledger.load_state_dict(saved)
    assert ledger.steps == 13
    ledger.load_state_dict(state)
    assert ledger.steps == 23


LEDGERS = st.integers(0, 3)
ACTIONS = st.one_of(
    st.tuples(st.just("begin"), LEDGERS, st.sampled_from([0, 1]), st.integers(1, 3)),
    st.tuples(st.just("save"), LEDGERS),
    st.tuples(st.just("load"), LEDGERS, st.integers(0, 20)),
    st.tuples(st.just("merge"), LEDGERS, LEDGERS),
    st.tuples(st.just("copy"), LEDGERS, LEDGERS),
    st.tuples(st.just("restart"), LEDGERS),
    st.tuples(st.just("fork"), LEDGERS, LEDGERS),
)


class Model:
    """Ledgers beside the sets of steps that each should know of."""

    def __init__(self):
        self.ledgers = [Ledger() for _ in range(4)]
        self.known = [set() for _ in range(4)]
        self.states = []
        self.begun = set()

    def act(self, action, one, *more):
        ledger = self.ledgers[one]
        if action == "begin":
            which, count = more
            ledger.begin(EVENTS[which], count)
            new = {(which, len(self.begun) + index) for index in range(count)}
            self.begun |= new
            self.known[one] |= new
        elif action == "save":
            self.states.append((json.dumps(ledger.state_dict()), set(self.known[one])))
        elif action == "load" and self.states:
            state, known = self.states[more[0] % len(self.states)]
            ledger.load_state_dict(json.loads(state))
            self.known[one] |= known
        elif action == "merge":
            ledger.merge(self.ledgers[more[0]])
            self.known[one] |= self.known[more[0]]
        elif action == "copy":
            self.ledgers[more[0]], self.known[more[0]] = copy.deepcopy(ledger), set(self.known[one])
        elif action == "restart":  # the process dies: only what was saved is left of it
            self.ledgers[one], self.known[one] = Ledger(), set()
        elif action == "fork" and more[0] != one:  # the very object goes on in another process
            self.ledgers[more[0]], self.known[more[0]] = forked(ledger), set(self.known[one])

    def check(self):
        for ledger, known in zip(self.ledgers, self.known, strict=True):
            truth = tuple(sum(which == index for which, _ in known) for index in range(2))
            assert counts(ledger) == truth
            assert ledger.steps == sum(truth)


def forked(ledger):
    """Returns the object as a child of this process has it: the same memory, another process token."""
    child = copy.copy(ledger)
    child._record = copy.deepcopy(ledger._record)
    child._run = record_module.RunId.__new__(record_module.RunId)
    child._run.__dict__.update(ledger._run.__dict__)
    child._run._token = object()  # as it is in a child, whose own token is a new one
    return child


@settings(deadline=None, max_examples=300)
@given(st.lists(ACTIONS, max_size=40))
def test_no_step_is_lost_and_none_is_counted_twice(actions):
    model = Model()
    for action in actions:
        model.act(*action)
        model.check()


def replaced(self, other):
    self.__dict__.update(other.__dict__)
    return []


BUGS = {
    "all runs have one id": (record_module.RunId, "value", property(lambda self: "the only run")),
    "a copy writes under the id of the original": (record_module.RunId, "__deepcopy__", lambda self, memo: self),
    "a fork writes under the id of its parent": (record_module.RunId, "value", property(lambda self: self._value)),
    "a state replaces the record": (record_module.Record, "join", replaced),
}


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_the_model_sees_a_planted_bug(monkeypatch, bug):
    monkeypatch.setattr(*BUGS[bug], raising=False)
    scripts = (
        [("begin", 0, 0, 3), ("begin", 1, 0, 2), ("merge", 0, 1)],
        [("begin", 0, 0, 3), ("copy", 0, 1), ("begin", 0, 0, 1), ("begin", 1, 0, 1), ("merge", 0, 1)],
        [("begin", 0, 0, 3), ("fork", 0, 1), ("begin", 0, 0, 1), ("begin", 1, 0, 1), ("merge", 0, 1)],
        [("begin", 0, 0, 3), ("save", 0), ("begin", 0, 0, 3), ("load", 0, 0)],
    )

    def run_all():
        for script in scripts:
            model = Model()
            for action in script:
                model.act(*action)
                model.check()

    with pytest.raises((AssertionError, LedgerError)):
        run_all()
