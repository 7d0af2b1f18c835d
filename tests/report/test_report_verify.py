"""Whether a report is of a ledger: the digest, and every number."""

from __future__ import annotations

import copy
import json
import re

import pytest

from privet.accounting import Budget, FileLedger, GaussianEvent, Ledger, Relation
from privet.errors import ConfigurationError, LedgerError
from privet.report import Report, ledger_digest, verify_report
from tests.report.reports import AUDIT, quick_ledger, sampled_ledger


def test_the_digest_is_of_the_record_and_of_nothing_else(tmp_path):
    ledger = quick_ledger(["one", "two"])
    again = Ledger(relation=Relation.ZERO_OUT, accountant="rdp", budget=Budget(9.0, 1e-5))
    again.mark("two")
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    shared = FileLedger(tmp_path / "a.ledger", relation=Relation.ZERO_OUT)
    shared.merge(ledger)
    assert ledger_digest(ledger) == ledger_digest(again) == ledger_digest(shared)


def test_whatever_changes_in_the_record_changes_the_digest():
    ledger = quick_ledger()
    found = {ledger_digest(ledger)}
    for change in (
        lambda: ledger.begin(GaussianEvent(16.0)),
        lambda: ledger.begin(GaussianEvent(16.000000000000004)),
        lambda: ledger.mark("batches left out"),
    ):
        change()
        found.add(ledger_digest(ledger))
    assert len(found) == 4


class Saved:
    """What a digest looks at: a state, and nothing else."""

    def __init__(self, state):
        self.state_dict = lambda: state


def test_every_part_of_the_state_is_in_the_digest():
    state = quick_ledger(["one"]).state_dict()
    ((run, phases),) = state["runs"].items()
    changes = {
        "version": 3,
        "relation": "replace_one",
        "unit": "user",
        "marks": ["two"],
        "runs": {run + "0": phases},
    }
    assert set(changes) == set(state)
    changed = [{**state, key: value} for key, value in changes.items()]
    changed += [{**state, "runs": {run: phases[::-1]}}, {**state, "runs": {run: phases[:1]}}]
    assert len({ledger_digest(Saved(each)) for each in [state, *changed]}) == 8


def test_a_value_without_a_canonical_form_is_refused():
    state = {**quick_ledger().state_dict(), "relation": float("nan")}

    with pytest.raises(LedgerError, match="no canonical form"):
        ledger_digest(Saved(state))


@pytest.mark.parametrize("ledger", [quick_ledger(), sampled_ledger("rdp")], ids=["pld", "rdp"])
def test_a_report_holds_against_its_own_ledger(ledger):
    report = Report.of(ledger, delta=1e-5, dataset_size=1000, declarations={"bias": "none known"}, audits=[AUDIT])
    found = verify_report(json.loads(report.to_json()), ledger)
    assert (found.same_ledger, found.differences, found.holds) == (True, (), True)


def test_a_report_of_another_ledger_is_told():
    ledger = quick_ledger()
    document = json.loads(Report.of(ledger, delta=1e-5).to_json())
    ledger.begin(GaussianEvent(16.0))
    found = verify_report(document, ledger)
    assert not found.same_ledger
    assert not found.holds
    assert "8 steps, and the ledger 9" in found.differences[1]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d["guarantee"].update(epsilon=0.9 * d["guarantee"]["epsilon"]), r"guarantee\.epsilon"),
        (lambda d: d["guarantee"].update(epsilon="inf"), r"guarantee\.epsilon"),
        (lambda d: d["guarantee"]["notes"].append("fine"), r"guarantee\.notes"),
        (lambda d: d["curve"][3].update(epsilon=0.01), r"curve\[3\]\.epsilon"),
        (lambda d: d["mu"].update(value=0.1), r"mu\.value"),
        (lambda d: d["attacks"][0].update(true_positive_rate=0.0011), r"attacks\[0\]"),
        (lambda d: d["ledger"].update(steps=7), r"ledger\.steps"),
        (lambda d: d["ledger"].update(unit="user"), r"ledger\.unit"),
        (lambda d: d["ledger"].update(marks=[]), r"ledger\.marks"),
        (lambda d: d["phases"][0].update(noise_multiplier=80.0), r"phases\[0\]\.noise_multiplier"),
        (lambda d: d["phases"].pop(), "phases is"),
        (lambda d: d["hazards"][2].update(status="library"), r"hazards\[2\]\.status"),
        (lambda d: d["audits"][0].update(epsilon=0.1), r"audits\[0\]\.epsilon"),
    ],
)
def test_a_number_that_was_changed_is_found(change, place):
    ledger = quick_ledger(["batches left out"])
    document = json.loads(Report.of(ledger, delta=1e-5, audits=[AUDIT]).to_json())
    changed = copy.deepcopy(document)
    change(changed)
    assert changed != document
    found = verify_report(changed, ledger)
    assert found.same_ledger
    assert not found.holds
    assert any(re.search(place, each) for each in found.differences), found.differences


def test_an_accountant_that_is_not_here_is_said_and_a_wrong_form_refused():
    ledger = quick_ledger()
    document = json.loads(Report.of(ledger, delta=1e-5).to_json())
    document["guarantee"]["accountant"] = "of their own"
    found = verify_report(document, ledger)
    assert found.same_ledger
    assert not found.holds
    assert "not registered here" in found.differences[0]
    with pytest.raises(ConfigurationError, match="no report of privet"):
        verify_report({"report": "privet"}, ledger)
