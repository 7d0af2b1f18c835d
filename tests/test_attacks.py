"""The table of attacks: how it judges, and that a quick selection of what the page promises holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import attacks.programs
from attacks.table import ATTACKS, Attack, Billed, Outcome, Unseen, judged, markdown
from privet import ProtocolError

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
PITFALLS = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
QUICK = ("losses", "replaced modules")
ROW = re.compile(r"^\| ([^|]+?) \| ([^|]+?) \| ([\w ]+) \| ([^|]+) \|$", re.MULTILINE)


def refused() -> Outcome:
    raise ProtocolError("no")


def fails() -> Outcome:
    raise ZeroDivisionError


JUDGED = [
    (lambda: 0.99, "bounded"),
    (lambda: 1.01, "BROKEN"),
    (lambda: float("nan"), "BROKEN"),
    (lambda: Billed(2.0, 2.0), "billed"),
    (lambda: Billed(1.9, 2.0), "BROKEN"),
    (lambda: Billed(float("inf"), float("inf")), "billed"),
    (lambda: Billed(3.0, float("inf")), "BROKEN"),
    (lambda: Unseen("One person with many records", "two rows"), "unseen and documented"),
    (lambda: Unseen("A row that does not exist", "two rows"), "BROKEN"),
    (lambda: "nothing stopped it", "BROKEN"),
    (refused, "stopped"),
    (fails, "BROKEN"),
]


@pytest.mark.parametrize(("run", "verdict"), JUDGED)
def test_the_table_sees_what_is_broken(run, verdict):
    assert judged(Attack("planted", "test", run)).verdict == verdict


@pytest.mark.parametrize("each", [a for a in ATTACKS if a.kind in QUICK], ids=lambda a: a.name)
def test_what_these_attacks_try_is_stopped_bounded_or_documented(each):
    result = judged(each)
    assert not result.broken, f"{each.name}: {result.said}"


def test_there_are_enough_of_them_and_no_name_twice():
    names = [(a.kind, a.name) for a in ATTACKS]
    assert len(names) == len(set(names)) >= 60
    assert {a.kind for a in ATTACKS} >= {
        "whose rows", "mixing", "state", "norms", "precision", "bill", "resume", "other ways to step", "losses",
        "replaced modules", "interrupts",
    }  # fmt: skip
    assert attacks.programs.__all__


def test_the_page_has_every_attack_and_no_other():
    listed = {(kind, name) for kind, name, *_ in ROW.findall(PAGE)} - {("class", "attack"), ("---", "---")}
    assert listed == {(a.kind, a.name.replace("|", "/")) for a in ATTACKS}, "run make attack, which writes the page"


def test_what_the_page_calls_documented_has_a_row():
    rows = PITFALLS.split("## What privet cannot see")[1]
    for _, _, verdict, said in ROW.findall(PAGE):
        if verdict == "unseen and documented":
            assert f"| {said.split('pitfalls: ')[1]}" in rows


def test_a_page_is_written_of_results():
    page = markdown([judged(Attack("planted", "test", lambda: 1.01))], note="Here.")
    assert "| test | planted | BROKEN | moves the sum by 1.01 C |" in page
    assert "1 attacks: 1 BROKEN" in page
