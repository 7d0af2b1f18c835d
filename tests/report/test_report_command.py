"""`privet report`: what it writes, refuses and verifies, with its exit status."""

from __future__ import annotations

import json
import sqlite3

import pytest

from privet.accounting import FileLedger, GaussianEvent, Relation
from privet.cli import main
from privet.report.schema import check_report
from tests.report.reports import AUDIT


@pytest.fixture
def ledger(tmp_path):
    found = FileLedger(tmp_path / "a.ledger", relation=Relation.ZERO_OUT)
    found.begin(GaussianEvent(8.0), 4)
    return found


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, arguments)])
    output = capsys.readouterr()
    return ended.value.code, output.out, output.err


def test_the_three_forms_and_a_file(capsys, ledger, tmp_path):
    code, text, _ = run(capsys, ledger.path, "--delta", "1e-5")
    assert code == 0
    assert text.startswith("# Privacy report\n")
    code, page, _ = run(capsys, ledger.path, "--delta", "1e-5", "--format", "html")
    assert (code, page[:15]) == (0, "<!DOCTYPE html>")
    out = tmp_path / "r.json"
    code, printed, _ = run(capsys, ledger.path, "--delta", "1e-5", "--format", "json", "--out", out)
    assert (code, printed) == (0, "")
    check_report(json.loads(out.read_text()))


def test_declarations_audits_and_a_note_reach_the_report(capsys, ledger, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(AUDIT))
    (tmp_path / "two.json").write_text(json.dumps([AUDIT, AUDIT]))
    options = ["--dataset-size", 500, "--declare", "tuning=a=b", "--note", "hello", "--accountant", "rdp"]
    options += ["--audit", tmp_path / "one.json", "--audit", tmp_path / "two.json", "--format", "json"]
    code, text, _ = run(capsys, ledger.path, "--delta", "1e-5", *options)
    data = json.loads(text)
    assert code == 0
    assert data["declarations"] == {"tuning": "a=b"}
    assert (data["note"], data["dataset_size"], len(data["audits"])) == ("hello", 500, 3)
    assert data["guarantee"]["accountant"] == "rdp"


def test_verify_says_whether_a_report_is_of_the_ledger(capsys, ledger, tmp_path):
    out = tmp_path / "r.json"
    run(capsys, ledger.path, "--delta", "1e-5", "--format", "json", "--out", out)
    code, text, _ = run(capsys, ledger.path, "--verify", out)
    assert code == 0
    assert "says what the accountant says" in text
    data = json.loads(out.read_text())
    data["guarantee"]["epsilon"] /= 2.0
    out.write_text(json.dumps(data))
    code, text, _ = run(capsys, ledger.path, "--verify", out)
    assert code == 4
    assert "guarantee.epsilon" in text
    ledger.begin(GaussianEvent(8.0))
    code, text, _ = run(capsys, ledger.path, "--verify", out)
    assert code == 4
    assert "not of this ledger" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--delta is needed"),
        (["--delta", "2"], "delta must be"),
        (["--delta", "0.1", "--dataset-size", "10"], "below 1/n"),
        (["--delta", "1e-5", "--declare", "tuning"], "TOPIC=TEXT"),
        (["--delta", "1e-5", "--declare", "tuning=a", "--declare", "tuning=b"], "each topic once"),
        (["--delta", "1e-5", "--declare", "tunning=a"], "Topics to declare"),
        (["--delta", "1e-5", "--audit", "nowhere.json"], "cannot be read as JSON"),
        (["--delta", "1e-5", "--out", "/nowhere/at/all.md"], "cannot be written"),
        (["--delta", "1e-5", "--accountant", "abacus"], "accountant must be"),
        (["--verify", "nowhere.json"], "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_is_said_with_status_2(capsys, ledger, options, message):
    code, text, error = run(capsys, ledger.path, *options)
    assert (code, text) == (2, "")
    assert message in error


def test_no_ledger_an_empty_one_and_one_that_was_changed_are_refused(capsys, ledger, tmp_path):
    missing = tmp_path / "none.ledger"
    code, _, error = run(capsys, missing, "--delta", "1e-5")
    assert code == 2
    assert "There is no ledger" in error
    assert not missing.exists()
    FileLedger(tmp_path / "empty.ledger")
    code, _, error = run(capsys, tmp_path / "empty.ledger", "--delta", "1e-5")
    assert code == 2
    assert "nothing was begun" in error
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("DELETE FROM phase")
    connection.close()
    code, _, error = run(capsys, ledger.path, "--delta", "1e-5")
    assert code == 2
    assert "changed by hand" in error
