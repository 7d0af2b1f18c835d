"""What a report says is what the ledger and its accountant say, and nothing is claimed where nothing can be."""

from __future__ import annotations

import json
import math
import sqlite3

import pytest

from privet.accounting import (
    Accountant,
    Bound,
    CorrelatedEvent,
    CorrelatedRelease,
    DiscreteGaussianEvent,
    FileLedger,
    FixedSizeEvent,
    GaussianEvent,
    Ledger,
    NegativeBinomialSelectionEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    Unit,
    get_accountant,
    get_epsilon,
    read_ledger,
)
from privet.errors import ConfigurationError, LedgerError
from privet.report import TOPICS, Report
from privet.report.described import described
from privet.report.hazards import Status, hazards
from tests.report.reports import AUDIT, quick_ledger, sampled_ledger


def status_of(report, words):
    (found,) = [each for each in hazards(report.facts) if words in each.name]
    return found.status


@pytest.fixture(scope="module")
def sampled():
    return Report.of(sampled_ledger(), delta=1e-6, dataset_size=10_000)


def test_every_number_is_the_accountants(sampled):
    event, relation = sampled_ledger().event(), Relation.ZERO_OUT
    asked, data = get_accountant("pld"), json.loads(sampled.to_json())
    bound = asked.epsilon_bounds(event, 1e-6, relation=relation)
    assert data["guarantee"]["epsilon"] == bound.upper == get_epsilon(event, 1e-6, relation=relation)
    assert data["guarantee"]["epsilon_lower_bound"] == bound.lower
    for point in data["curve"][::4]:
        assert point["epsilon"] == pytest.approx(get_epsilon(event, point["delta"], relation=relation), rel=1e-3)
    assert [point["delta"] for point in data["curve"]] == [float(f"1e-{power}") for power in range(3, 13)]
    mu = asked.mu(event, smallest_delta=1e-10, relation=relation)
    assert data["mu"] == {"value": pytest.approx(mu, rel=1e-3), "smallest_delta": 1e-10}
    for attack in data["attacks"]:
        rate = attack["false_positive_rate"]
        known = asked.true_positive_rate(event, rate, relation=relation)
        assert attack["true_positive_rate"] == pytest.approx(known, rel=0.02)  # from the same curve, at other points
        assert attack["true_positive_rate"] >= rate
    assert [attack["false_positive_rate"] for attack in data["attacks"]] == [1e-3, 1e-2, 1e-1]


def test_a_gaussian_has_the_numbers_of_the_closed_form():
    # μ² adds up: 3/8² + 5/16²; the power of the best test at rate α is Φ(Φ⁻¹(α) + μ).
    from scipy.special import ndtr, ndtri

    facts, mu = Report.of(quick_ledger(), delta=1e-5).facts, math.sqrt(3 / 64 + 5 / 256)
    assert facts.mu == pytest.approx(mu, rel=1e-6)
    for rate, power in facts.attacks:
        exact = float(ndtr(ndtri(rate) + mu))
        assert exact <= power <= exact * 1.02


def test_numbers_in_the_text_are_rounded_to_the_side_that_promises_less(sampled):
    text, epsilon = sampled.to_markdown(), sampled.facts.epsilon
    shown = float(text.split("| ε, upper bound |")[1].split("|")[0])
    assert epsilon.upper <= shown <= epsilon.upper * 1.00001
    below = float(text.split("at least ")[1].split("|")[0])
    assert epsilon.lower * 0.99999 <= below <= epsilon.lower
    power = sampled.facts.attacks[1][1]
    assert f"at most {math.ceil(power * 1000)} of 1000" in text


def test_the_ledgers_own_accountant_answers():
    class Flat(Accountant):
        name = "flat in a test"

        def bound_epsilon(self, event, delta, *, relation, group_size, lower):
            return Bound(7.0, 0.0, self.name, ("a note of its own",))

        def bound_delta(self, event, epsilon, *, relation, group_size, lower):
            return Bound(0.0 if epsilon >= 7.0 else 1.0, 0.0, self.name)

    ledger = Ledger(accountant=Flat())
    ledger.begin(GaussianEvent(1.0))
    report = Report.of(ledger, delta=1e-5)
    assert report.facts.epsilon.upper == 7.0
    assert "a note of its own" in report.to_markdown()
    assert Report.of(quick_ledger(), delta=1e-5).facts.accountant == "pld"


def test_an_empty_ledger_and_what_is_no_ledger_are_refused():
    with pytest.raises(LedgerError, match="empty"):
        Report.of(Ledger(), delta=1e-5)
    with pytest.raises(ConfigurationError, match="role of a ledger"):
        Report.of(None, delta=1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, 1e-4, 2e-4])
def test_a_delta_that_promises_nothing_is_refused(delta):
    with pytest.raises(ConfigurationError, match="delta must be"):
        Report.of(quick_ledger(), delta=delta, dataset_size=10_000)


def test_the_number_of_records_is_read_from_events_that_name_it():
    ledger = Ledger(relation=Relation.REPLACE_ONE)
    ledger.begin(FixedSizeEvent(10, 100, GaussianEvent(5.0)))
    with pytest.raises(ConfigurationError, match=r"below 1/n = 0\.01 for n = 100"):
        Report.of(ledger, delta=0.01)


def test_without_a_bound_there_is_no_promise():
    ledger = Ledger()
    ledger.begin(GaussianEvent(0.0))
    report = Report.of(ledger, delta=1e-5)
    text, data = report.to_markdown(), json.loads(report.to_json())
    assert "No promise can be made" in text
    assert "At most" not in text
    assert data["guarantee"]["epsilon"] == data["mu"]["value"] == "inf"
    assert [each["true_positive_rate"] for each in data["attacks"]] == [1.0, 1.0, 1.0]
    assert "a release without noise" in text
    assert "<svg" not in report.to_html()


def test_a_file_is_read_without_being_changed_and_refused_where_it_was(tmp_path):
    path = tmp_path / "a.ledger"
    with pytest.raises(LedgerError, match="no ledger at"):
        read_ledger(path)
    assert not path.exists()
    ledger = FileLedger(path, relation=Relation.REPLACE_ONE, unit=Unit.USER)
    ledger.begin(GaussianEvent(4.0), 7)
    ledger.mark("batches left out")
    before = path.read_bytes()
    path.chmod(0o444)
    found = read_ledger(path)
    assert (found.relation, found.unit, found.phases, found.marks) == (
        ledger.relation,
        ledger.unit,
        ledger.phases,
        ledger.marks,
    )
    assert path.read_bytes() == before
    path.chmod(0o644)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE phase SET count = 1")
    connection.close()
    with pytest.raises(LedgerError, match="changed by hand"):
        read_ledger(path)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(LedgerError):
        read_ledger(path)
    path.write_text("nothing of the kind")
    with pytest.raises(LedgerError, match="damaged, or not a ledger"):
        read_ledger(path)


def test_a_head_that_is_damaged_is_said(tmp_path):
    FileLedger(tmp_path / "a.ledger").begin(GaussianEvent(4.0))
    with sqlite3.connect(tmp_path / "a.ledger") as connection:
        connection.execute("UPDATE head SET unit = 'planet'")
    connection.close()
    with pytest.raises(LedgerError, match="its head is"):
        read_ledger(tmp_path / "a.ledger")


def test_hazards_are_open_until_somebody_settles_them():
    bare = Report.of(quick_ledger(), delta=1e-5)
    declared = Report.of(
        quick_ledger(), delta=1e-5, dataset_size=100, declarations=dict.fromkeys(TOPICS, "done with care")
    )
    for words in ("Preprocessing", "A checkpoint", "Hyperparameters", "One person", "Side channels", "bias", "Trust"):
        assert (status_of(bare, words), status_of(declared, words)) == (Status.OPEN, Status.USER), words
    assert (status_of(bare, "δ that is too large"), status_of(declared, "δ that is too large")) == (
        Status.OPEN,
        Status.LIBRARY,
    )
    assert status_of(declared, "Floating-point") is Status.OPEN
    assert declared.to_markdown().count("done with care") >= len(TOPICS)


def test_a_reproducible_key_a_selection_and_a_unit_change_what_is_said():
    assert status_of(Report.of(quick_ledger(), delta=1e-5), "Keys") is Status.LIBRARY
    keyed = Report.of(quick_ledger(["reproducible key"]), delta=1e-5)
    assert status_of(keyed, "Keys") is Status.OPEN
    assert "this report promises nothing" in keyed.to_markdown().split("## Who is protected")[0]
    tuned = quick_ledger()
    tuned.begin(NegativeBinomialSelectionEvent(1.0, 0.2, GaussianEvent(20.0)))
    selected = Report.of(tuned, delta=1e-5)
    assert status_of(selected, "Hyperparameters") is Status.LIBRARY
    for words in ("the best of them released, and that alone", "the runs that were not the best", "sees the best run"):
        assert words in selected.to_markdown()
        assert words not in keyed.to_markdown()
    users = Ledger(unit=Unit.USER)
    users.begin(GaussianEvent(4.0))
    assert status_of(Report.of(users, delta=1e-5), "One person") is Status.USER


def test_an_audit_that_contradicts_the_ledger_is_said_first():
    above = {**AUDIT, "lower_bound": 5.0}
    fine, report = (Report.of(quick_ledger(), delta=1e-6, audits=[each]) for each in (AUDIT, above))
    assert "contradicts" not in fine.to_markdown()
    assert "contradicts this report" in report.to_markdown().split("## Who is protected")[0]
    ((_, epsilon),) = report.facts.audits
    assert epsilon == quick_ledger().epsilon(1e-5)  # at the audit's δ, not at the report's


def test_audits_of_the_library_are_taken_as_they_are_written():
    from privet.audit.mechanism import MechanismAudit
    from privet.audit.training import TrainingAudit

    shared = {"delta": 1e-5, "confidence": 0.999, "canaries": 100, "version": "0.1.0"}
    mechanism = MechanismAudit(
        claimed=3.0,
        lower_bound=math.inf,
        by_noise=math.inf,
        by_errors=2.0,
        noise_ratio=0.0,
        row_ratio=None,
        findings=("no noise was found",),
        steps=10,
        seconds=1.5,
        **shared,
    )
    training = TrainingAudit(
        lower_bound=0.2,
        lower_bound_gaussian=0.3,
        claimed=None,
        refuted=None,
        guesses=20,
        correct=15,
        accuracy=0.6,
        tries=7,
        **shared,
    )
    report = Report.of(
        quick_ledger(), delta=1e-5, audits=[json.loads(each.to_json()) for each in (mechanism, training)]
    )
    text = report.to_markdown()
    assert text.count("contradicts this report") == 2
    assert "no noise was found" in text
    assert [each["kind"] for each in json.loads(report.to_json())["audits"]] == ["mechanism", "training"]


def test_an_audit_without_a_needed_key_is_refused():
    for key in ("kind", "lower_bound", "delta", "confidence", "canaries", "version"):
        given = {name: value for name, value in AUDIT.items() if name != key}
        with pytest.raises(ConfigurationError, match=f"Audit 0: .*missing are .*{key}"):
            Report.of(quick_ledger(), delta=1e-5, audits=[given])
    with pytest.raises(ConfigurationError, match="Audit 0"):
        Report.of(quick_ledger(), delta=1e-5, audits=["an audit"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"findings": "none"}, "list of texts"),
        ({"kind": 3}, "must be texts"),
        ({"confidence": 1.0}, "confidence"),
        ({"lower_bound": -1.0}, "lower_bound"),
        ({"lower_bound": math.nan}, "lower_bound"),
        ({"claimed": "much"}, "claimed"),
        ({"lower_bound": None}, "lower_bound"),
    ],
)
def test_an_audit_of_another_form_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=f"Audit 1: .*{message}"):
        Report.of(quick_ledger(), delta=1e-5, audits=[AUDIT, {**AUDIT, **change}])


@pytest.mark.parametrize(("topic", "text"), [("tunning", "x"), ("tuning", " "), ("tuning", 3)])
def test_a_declaration_of_nothing_is_refused(topic, text):
    with pytest.raises(ConfigurationError, match="declar"):
        Report.of(quick_ledger(), delta=1e-5, declarations={topic: text})


def test_events_are_described_with_the_numbers_that_they_have():
    poisson = described(PoissonEvent(0.02, GaussianEvent(1.5)))
    assert (poisson.name, poisson.rate, poisson.noise_multiplier) == ("Poisson", 0.02, 1.5)
    shuffled = described(PartitionEvent(1, GaussianEvent(3.0)))
    assert (shuffled.name, shuffled.rate) == ("partition", 1.0)
    assert "nothing is amplified" in shuffled.sampler
    discrete = described(PoissonEvent(0.1, DiscreteGaussianEvent(1.25, 0.001)))
    assert (discrete.name, discrete.noise_multiplier, discrete.rate) == ("Poisson", 1.25, 0.1)
    assert "discrete Gaussian noise of 1.25 times" in discrete.mechanism
    correlated = described(CorrelatedEvent(2, 50, CorrelatedRelease(1.5, (1.0, 0.5))))
    assert (correlated.name, correlated.noise_multiplier) == ("partition in a fixed order", 1.5)
    assert "every 50 steps" in correlated.sampler
    assert "correlated over steps" in correlated.mechanism
    nested = described(PoissonEvent(0.5, PoissonEvent(0.5, GaussianEvent(1.0))))
    assert nested.rate is None
    assert "inside it" in nested.sampler
    assert "without any noise" in described(GaussianEvent(0.0)).mechanism
    assert "5 on average" in described(NegativeBinomialSelectionEvent(1.0, 0.2, GaussianEvent(1.0))).mechanism
