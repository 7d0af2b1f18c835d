"""The shared file: concurrent writers, kills at any moment, and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from privet.accounting import Budget, FileLedger, GaussianEvent, Phase, PoissonEvent, Relation, Unit
from privet.errors import BudgetExceededError, ConfigurationError, LedgerError

STEP = PoissonEvent(0.01, GaussianEvent(1.0))
SOURCE = Path(__file__).resolve().parents[2] / "src"
WRITER = """
import sys
from privet.accounting import FileLedger, GaussianEvent, PoissonEvent
ledger = FileLedger(sys.argv[1], block=int(sys.argv[3]))
for _ in range(int(sys.argv[2])):
    ledger.begin(PoissonEvent(0.01, GaussianEvent(1.0)))
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def begin_often(ledger):
    for _ in range(10_000):
        ledger.begin(STEP)


def total(path):
    return sum(phase.count for phase in FileLedger(path).phases)


def writer(path, steps, block=1):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(steps), str(block)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )


def test_runs_share_a_file(tmp_path):
    one, two = FileLedger(tmp_path / "ledger", run="one"), FileLedger(tmp_path / "ledger", run="two")
    for _ in range(3):
        one.begin(STEP)
        two.begin(STEP, 2)
    assert one.phases == two.phases == (Phase(STEP, 3), Phase(STEP, 6))
    assert one.epsilon(1e-5) == two.epsilon(1e-5) > 0.0
    assert FileLedger(tmp_path / "ledger").event() == two.event()
    assert len((tmp_path / "ledger").read_text().splitlines()) == 4


def test_concurrent_processes_and_threads_are_all_counted(tmp_path):
    path = tmp_path / "ledger"
    processes = [writer(path, 25) for _ in range(3)]
    ledger = FileLedger(path)
    threads = [threading.Thread(target=lambda: [FileLedger(path).begin(STEP) for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        ledger.begin(STEP)
    for thread in threads:
        thread.join()
    assert all(process.wait() == 0 for process in processes)
    for process in processes:
        process.stdout.close()
    assert total(path) == 3 * 25 + 3 * 10 + 10


@pytest.mark.parametrize("block", [1, 7])
def test_a_kill_at_any_moment_never_under_counts(tmp_path, block):
    path = tmp_path / "ledger"
    FileLedger(path)
    drawn = 0
    for wait in (0.0, 0.004, 0.011, 0.023):
        with writer(path, 100_000, block) as process:
            process.stdout.read(5)  # it is running
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            drawn += 5 + len(process.stdout.read())
        assert total(path) >= drawn
    assert total(path) <= drawn + 4 * block
    # What a kill left beside the file does not disturb the next run.
    FileLedger(path).begin(STEP)


def test_a_block_is_billed_whole_and_used_up_first(tmp_path):
    ledger = FileLedger(tmp_path / "ledger", block=10)
    for _ in range(10):
        ledger.begin(STEP)
    assert total(tmp_path / "ledger") == 10
    ledger.begin(STEP)
    assert total(tmp_path / "ledger") == 20


def test_a_forked_child_does_not_spend_what_its_parent_reserved(tmp_path):
    ledger = FileLedger(tmp_path / "ledger", block=10)
    ledger.begin(STEP)
    ledger._process -= 1  # as a fork sees it
    ledger.begin(STEP)
    assert total(tmp_path / "ledger") == 20


def test_one_budget_for_all_runs(tmp_path):
    path = tmp_path / "ledger"
    budget = Budget(1.0, 1e-5)
    one = FileLedger(path, budget=budget, accountant="rdp", block=50)
    two = FileLedger(path, budget=budget, accountant="rdp")
    with pytest.raises(BudgetExceededError, match="Nothing was begun"):
        begin_often(one)
    before = path.read_bytes()
    with pytest.raises(BudgetExceededError):
        two.begin(STEP, 60)
    assert path.read_bytes() == before
    assert two.epsilon(1e-5) <= 1.0


def damaged(path, change):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace('"count": 3', '"count": 2'), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2),
        (lambda lines: lines[:-1], 4),
        (lambda lines: [*lines[:-1], lines[-1].rstrip("\n")], 4),
        (lambda lines: [*lines[:-1], lines[-1][:20]], 4),
        (lambda lines: [*lines, lines[1]], 5),
        (lambda lines: [lines[0].replace("add_or_remove_one", "zero_out"), *lines[1:]], 1),
        (lambda lines: [], 1),
        (lambda lines: ["garbage\n"], 1),
    ],
)
def test_damage_is_refused_with_its_line_and_left_alone(tmp_path, change, line):
    path = tmp_path / "ledger"
    ledger = FileLedger(path, run="one")
    ledger.begin(STEP, 3)
    ledger.begin(GaussianEvent(2.0), 4)
    damaged(path, change)
    before = path.read_bytes()
    for attempt in (lambda: ledger.begin(STEP), lambda: ledger.epsilon(1e-5), lambda: FileLedger(path)):
        with pytest.raises(LedgerError, match=rf"line {line}: "):
            attempt()
    assert path.read_bytes() == before


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\xff", 1))
    with pytest.raises(LedgerError, match="line 2: not text"):
        ledger.begin(STEP)


def test_a_ledger_that_is_gone_is_not_begun_anew(tmp_path):
    ledger = FileLedger(tmp_path / "ledger")
    ledger.begin(STEP)
    (tmp_path / "ledger").unlink()
    with pytest.raises(LedgerError, match="is gone"):
        ledger.begin(STEP)


def test_another_relation_or_unit_is_refused(tmp_path):
    FileLedger(tmp_path / "ledger", relation=Relation.ZERO_OUT, unit=Unit.USER)
    with pytest.raises(LedgerError, match="line 1: expected the header"):
        FileLedger(tmp_path / "ledger")


def test_bad_counts_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="whole number"):
        FileLedger(tmp_path / "ledger").begin(STEP, 0)
    with pytest.raises(ConfigurationError, match="block must be"):
        FileLedger(tmp_path / "ledger", block=0)
