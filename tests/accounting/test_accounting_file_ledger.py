"""The shared file: concurrent writers, kills at any moment, links, copies put back, and damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from privet.accounting import (
    Budget,
    Event,
    FileLedger,
    GaussianEvent,
    Ledger,
    Phase,
    PoissonEvent,
    Relation,
    Unit,
    mirror,
    sqlite_file,
)
from privet.accounting.mirror import Mirror
from privet.errors import BudgetExceededError, ConfigurationError, LedgerError

STEP = PoissonEvent(0.01, GaussianEvent(1.0))
OTHER = PoissonEvent(0.02, GaussianEvent(1.2))
SOURCE = Path(__file__).resolve().parents[2] / "src"
WRITER = """
import sys
from privet.accounting import FileLedger, GaussianEvent, PoissonEvent
ledger = FileLedger(sys.argv[1], block=int(sys.argv[3]))
events = [PoissonEvent(0.01, GaussianEvent(1.0)), PoissonEvent(0.02, GaussianEvent(1.2))]
for index in range(int(sys.argv[2])):
    ledger.begin(events[index % int(sys.argv[4])])
    sys.stdout.write("x")
    sys.stdout.flush()
"""


def begin_often(ledger):
    for _ in range(10_000):
        ledger.begin(STEP)


def names(folder):
    return [path.name for path in folder.iterdir()]


def total(path):
    return FileLedger(path).steps


def writer(path, steps, block=1, events=1):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(steps), str(block), str(events)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )


def changed(path, *statements):
    """Changes the file by hand, as someone would with SQLite's own tool."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


# -- several runs --------------------------------------------------------------------------------------------------


def test_runs_share_a_file(tmp_path):
    one, two = FileLedger(tmp_path / "ledger", run="one"), FileLedger(tmp_path / "ledger", run="two")
    assert (one.run[:4], two.run[:4]) == ("one-", "two-")
    for _ in range(3):
        one.begin(STEP)
        two.begin(OTHER, 2)
    two.mark("reproducible key")
    two.mark("reproducible key")
    assert one.phases == two.phases == FileLedger(tmp_path / "ledger").phases == (Phase(STEP, 3), Phase(OTHER, 6))
    assert one.marks == ("reproducible key",)
    assert one.steps == 9
    assert one.epsilon(1e-5) == two.epsilon(1e-5) > 0.0
    assert FileLedger(tmp_path / "ledger").event() == two.event()
    assert names(tmp_path) == ["ledger"]


def test_concurrent_processes_and_threads_are_all_counted(tmp_path):
    path = tmp_path / "ledger"
    processes = [writer(path, 12, events=2) for _ in range(2)]
    ledger = FileLedger(path)
    threads = [threading.Thread(target=lambda: [ledger.begin(STEP) for _ in range(6)]) for _ in range(2)]
    threads += [threading.Thread(target=lambda: [FileLedger(path).begin(OTHER) for _ in range(4)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(process.wait() == 0 for process in processes)
    for process in processes:
        process.stdout.close()
    assert total(path) == ledger.steps == 2 * 12 + 2 * 6 + 2 * 4
    assert ledger.marks == ()


@pytest.mark.parametrize(("block", "events"), [(1, 1), (1, 2), (7, 1)])
def test_a_kill_at_any_moment_never_under_counts(tmp_path, block, events):
    path = tmp_path / "ledger"
    FileLedger(path)
    drawn = 0
    for wait in (0.0, 0.004, 0.011, 0.023):
        with writer(path, 100_000, block, events) as process:
            process.stdout.read(3)  # it is running
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            drawn += 3 + len(process.stdout.read())
        assert total(path) >= drawn
    assert total(path) <= drawn + 4 * block * events
    # What a kill left beside the file does not disturb the next run.
    FileLedger(path).begin(STEP)
    assert names(tmp_path) == ["ledger"]


def test_a_kill_in_the_middle_of_a_transaction_is_undone_by_the_next_run(tmp_path):
    path = tmp_path / "ledger"
    FileLedger(path).begin(STEP, 3)
    killed = """
import os, sys, sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
for index in range(3000):
    connection.execute("INSERT INTO phase VALUES (NULL, ?, 0, 'half', 1, 99)", (str(index),))
connection.execute("UPDATE head SET digest = 'half'")
os.kill(os.getpid(), 9)
"""
    path.chmod(0o660)
    subprocess.run([sys.executable, "-c", killed, str(path)], check=False)
    journal = tmp_path / "ledger-journal"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o660
    assert b"half" in path.read_bytes(), "nothing was left to be undone"
    assert FileLedger(path).phases == (Phase(STEP, 3),)
    assert names(tmp_path) == ["ledger"]


def test_each_begin_costs_the_same_with_two_events_in_turn(tmp_path, monkeypatch):
    work = {"rows": 0, "whole": 0}
    digest, read_all = mirror._digest, Mirror._read_all

    def counting_digest(*values):
        work["rows"] += 1
        return digest(*values)

    def counting_read(self, *args):
        work["whole"] += 1
        return read_all(self, *args)

    one, two = FileLedger(tmp_path / "ledger"), FileLedger(tmp_path / "ledger")
    monkeypatch.setattr(mirror, "_digest", counting_digest)
    monkeypatch.setattr(Mirror, "_read_all", counting_read)
    spent = []
    for _ in range(3):
        before = work["rows"]
        for index in range(20):
            one.begin((STEP, OTHER)[index % 2])
            two.begin((OTHER, STEP)[index % 2])
        spent.append(work["rows"] - before)
    assert spent[0] > 0
    assert max(spent) <= spent[0] + 5
    assert work["whole"] == 0
    assert one.steps == two.steps == 120


def test_others_wait_from_the_first_look_at_the_file_until_the_step_is_written(tmp_path, monkeypatch):
    ledger, refresh, locked = FileLedger(tmp_path / "ledger"), Mirror.refresh, []

    def looking(self, connection):
        with closing(sqlite3.connect(tmp_path / "ledger", isolation_level=None, timeout=0.0)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                locked.append(str(error))
        return refresh(self, connection)

    monkeypatch.setattr(Mirror, "refresh", looking)
    ledger.begin(STEP)
    assert locked == ["database is locked"]


def test_a_begin_is_on_the_disk_before_it_returns(tmp_path):
    with closing(FileLedger(tmp_path / "ledger")._file._open()) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_block_is_billed_whole_and_used_up_first(tmp_path):
    ledger = FileLedger(tmp_path / "ledger", block=10)
    for _ in range(10):
        ledger.begin(STEP)
    assert total(tmp_path / "ledger") == 10
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
    for ledger in (one, two):
        with pytest.raises(BudgetExceededError):
            ledger.begin(STEP, 60)
    assert path.read_bytes() == before
    assert two.epsilon(1e-5) <= 1.0


def test_what_other_runs_begin_counts_against_the_budget_at_once(tmp_path):
    path = tmp_path / "ledger"
    one = FileLedger(path, budget=Budget(2.0, 1e-5), accountant="rdp")
    for _ in range(5):
        one.begin(STEP)
    FileLedger(path).begin(GaussianEvent(0.5))
    with pytest.raises(BudgetExceededError):
        one.begin(STEP)


# -- which file ----------------------------------------------------------------------------------------------------


def test_links_and_a_change_of_folder_lead_to_one_ledger(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "ledger")
    (tmp_path / "folder").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    ledgers = [FileLedger(path) for path in ("link", "data/ledger", "folder/ledger", str(tmp_path / "link"))]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for ledger in ledgers:
        ledger.begin(STEP)
    assert {ledger.path for ledger in ledgers} == {tmp_path / "data" / "ledger"}
    assert [ledger.steps for ledger in ledgers] == [4, 4, 4, 4]
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "data") == ["ledger"]


def test_hard_links_are_refused_whenever_they_appear(tmp_path):
    ledger = FileLedger(tmp_path / "ledger")
    (tmp_path / "other").hardlink_to(tmp_path / "ledger")
    for attempt in (lambda: ledger.begin(STEP), lambda: FileLedger(tmp_path / "other")):
        with pytest.raises(LedgerError, match=r"2 hard links.*one name"):
            attempt()
    (tmp_path / "other").unlink()
    ledger.begin(STEP)
    assert ledger.steps == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
def test_permissions_and_group_are_kept(tmp_path, mode):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    path.chmod(mode)
    before = path.stat()
    ledger.begin(STEP)
    after = path.stat()
    assert stat.S_IMODE(after.st_mode) == mode
    assert (after.st_uid, after.st_gid, after.st_ino) == (before.st_uid, before.st_gid, before.st_ino)


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    old = os.umask(0o007)
    try:
        FileLedger(tmp_path / "ledger")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "ledger").stat().st_mode) == 0o660


def test_a_ledger_that_is_gone_is_not_begun_anew(tmp_path):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    ledger.begin(STEP, 3)
    shutil.copy(path, tmp_path / "copy")
    path.unlink()
    for attempt in (lambda: ledger.begin(STEP), lambda: ledger.epsilon(1e-5), lambda: ledger.mark("x")):
        with pytest.raises(LedgerError, match="is gone"):
            attempt()
    assert not path.exists()
    shutil.move(tmp_path / "copy", path)
    ledger.begin(STEP)
    assert ledger.steps == 4


# -- copies put back -----------------------------------------------------------------------------------------------


def put_back_by_rename(copy, path):
    shutil.copy(copy, path.with_name("moved"))
    path.with_name("moved").replace(path)


@pytest.mark.parametrize("put_back", [shutil.copy, put_back_by_rename])
def test_a_copy_put_back_in_mid_run_loses_nothing_that_living_runs_know_of(tmp_path, put_back):
    path = tmp_path / "ledger"
    one, two = FileLedger(path), FileLedger(path)
    one.begin(STEP, 100)
    shutil.copy(path, tmp_path / "copy")
    one.begin(OTHER, 2)
    one.begin(STEP)
    two.begin(OTHER, 5)
    put_back(tmp_path / "copy", path)
    one.begin(STEP)
    assert one.steps == 104, "what this run wrote, and nothing of what it has not seen"
    two.begin(STEP)
    assert one.steps == two.steps == total(path) == 110
    assert any("put back from an earlier copy" in mark for mark in FileLedger(path).marks)


def test_a_copy_put_back_and_then_written_to_by_another_run_loses_nothing(tmp_path):
    path = tmp_path / "ledger"
    one = FileLedger(path)
    one.begin(STEP, 10)
    shutil.copy(path, tmp_path / "copy")
    for _ in range(5):
        one.begin(STEP)
    put_back_by_rename(tmp_path / "copy", path)
    other = FileLedger(path)
    for _ in range(9):  # more changes than the run at hand has seen
        other.begin(OTHER)
    assert one.steps == 24
    assert total(path) == 24


def test_a_file_replaced_during_a_transaction_gets_the_step_too(tmp_path, monkeypatch):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    ledger.begin(STEP, 5)
    shutil.copy(path, tmp_path / "copy")
    ledger.begin(STEP)
    write = Mirror.write

    def write_and_replace(self, *args):
        monkeypatch.setattr(Mirror, "write", write)
        head = write(self, *args)
        put_back_by_rename(tmp_path / "copy", path)
        return head

    monkeypatch.setattr(Mirror, "write", write_and_replace)
    ledger.begin(STEP)
    assert total(path) == 7


def test_a_checkpoint_gives_back_what_an_earlier_copy_of_the_file_lacks(tmp_path):
    path = tmp_path / "ledger"
    first = FileLedger(path)
    first.begin(STEP, 10)
    shutil.copy(path, tmp_path / "copy")
    first.begin(STEP, 5)
    first.begin(OTHER, 1)
    state = json.loads(json.dumps(first.state_dict()))
    put_back_by_rename(tmp_path / "copy", path)
    resumed = FileLedger(path)
    assert resumed.steps == 10
    for _ in range(2):
        resumed.load_state_dict(state)
        assert resumed.steps == total(path) == 16
    in_memory = Ledger()
    in_memory.begin(STEP)
    in_memory.merge(resumed)
    resumed.merge(in_memory)
    assert in_memory.steps == resumed.steps == 17


# -- damage --------------------------------------------------------------------------------------------------------

BY_HAND = {
    "a count lowered": "UPDATE phase SET count = 1 WHERE place = 0",
    "an event exchanged": "UPDATE phase SET event = replace(event, '1.0', '9.0')",
    "a row taken out": "DELETE FROM phase WHERE place = 1",
    "the first row taken out": "DELETE FROM phase WHERE place = 0",
    "a row added": "INSERT INTO phase SELECT NULL, 'x', 0, event, count, changed FROM phase WHERE place = 0",
    "a run renamed": "UPDATE phase SET run = 'x'",
    "a mark taken out": "DELETE FROM mark",
    "the digest changed": (
        "UPDATE head SET digest = CASE substr(digest, 1, 1) WHEN 'f' THEN 'e' ELSE 'f' END || substr(digest, 2)"
    ),
    "the relation changed": "UPDATE head SET relation = 'zero_out'",
    "no head": "DELETE FROM head",
    "two heads": "INSERT INTO head SELECT * FROM head",
    "no table": "DROP TABLE phase",
    "no number": "UPDATE phase SET count = 'many' WHERE place = 0",
    "no digest": "UPDATE head SET digest = 'none'",
}


@pytest.mark.parametrize("change", sorted(BY_HAND))
def test_a_change_by_hand_is_refused_and_left_alone(tmp_path, change):
    path = tmp_path / "ledger"
    ledger = FileLedger(path, run="one")
    ledger.begin(STEP, 3)
    ledger.begin(GaussianEvent(2.0), 4)
    ledger.mark("reproducible key")
    changed(path, BY_HAND[change])
    before = path.read_bytes()
    with pytest.raises(LedgerError):
        FileLedger(path)
    assert path.read_bytes() == before


def test_a_change_by_hand_of_what_a_living_run_writes_next_stops_it(tmp_path):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    ledger.begin(STEP, 3)
    changed(path, "UPDATE phase SET count = 2, changed = 9")
    with pytest.raises(LedgerError, match="changed by hand"):
        ledger.begin(STEP)


def test_a_forger_who_computes_the_digest_is_seen_by_living_runs_only(tmp_path):
    """It is what the page says: the digest has no key."""
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    ledger.begin(STEP, 3)
    ledger.begin(STEP, 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        run, place, text = connection.execute("SELECT run, place, event FROM phase").fetchone()
        digest = mirror._digest("head", 2, "add_or_remove_one", "example")
        digest += mirror._digest("phase", run, place, text, 1)
        connection.execute("UPDATE phase SET count = 1, changed = 9")
        connection.execute("UPDATE head SET changes = 9, digest = ?", (f"{digest % 2**256:064x}",))
    assert FileLedger(path).steps == 1
    ledger.begin(STEP)
    assert FileLedger(path).steps == 7


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, -4096])
def test_a_file_that_was_cut_is_refused(tmp_path, keep, monkeypatch):
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    content = path.read_bytes()
    assert len(content) > 2 * 4096
    path.write_bytes(content[:keep])
    monkeypatch.setattr(sqlite_file.LedgerFile, "_wait_until_filled", lambda self: None)
    for attempt in (lambda: ledger.begin(STEP), lambda: FileLedger(path)):
        with pytest.raises(LedgerError, match=r"empty|damaged|no ledger|cannot be read"):
            attempt()
    assert path.read_bytes() == content[:keep]


def test_bytes_overwritten_with_garbage_are_refused(tmp_path):
    path = tmp_path / "ledger"
    FileLedger(path).begin(STEP)
    content = bytearray(path.read_bytes())
    where = content.index(b'"poisson"')
    content[where : where + 9] = b"\xff" * 9
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        FileLedger(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some other file, rather long, so that it may be taken for something" * 10, "begins with b'some other file"),
        (b'0123456789abcdef {"ledger": "privet", "version": 1}\n' * 30, r"version 1, in text.*docs/accounting\.md"),
    ],
)
def test_foreign_files_are_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "ledger"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=message):
        FileLedger(path)
    assert path.read_bytes() == content


def test_another_database_is_refused_with_its_tables(tmp_path):
    changed(tmp_path / "ledger", "CREATE TABLE customers (name TEXT)")
    with pytest.raises(LedgerError, match=r"no ledger.*\['customers'\]"):
        FileLedger(tmp_path / "ledger")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LedgerError, match="not a regular file"):
        FileLedger(tmp_path / "folder")


def test_the_lines_of_version_1_can_be_begun_in_a_new_file(tmp_path):
    """What docs/accounting.md says to do with a ledger of version 1."""
    values = [
        {"ledger": "privet", "version": 1, "relation": "zero_out", "unit": "example"},
        {"run": "one", "phase": {"event": STEP.to_dict(), "count": 3}},
        {"run": "two", "phase": {"event": OTHER.to_dict(), "count": 4}},
        {"end": 4},
    ]
    (tmp_path / "old").write_text("".join(f"0123456789abcdef {json.dumps(value)}\n" for value in values))
    ledger = FileLedger(tmp_path / "new", relation=Relation.ZERO_OUT)
    for line in (tmp_path / "old").read_text().splitlines():
        value = json.loads(line.split(" ", 1)[1])
        if "phase" in value:
            ledger.begin(Event.from_dict(value["phase"]["event"]), value["phase"]["count"])
    assert ledger.phases == (Phase(STEP, 3), Phase(OTHER, 4))


def test_another_relation_or_unit_is_refused(tmp_path):
    FileLedger(tmp_path / "ledger", relation=Relation.ZERO_OUT, unit=Unit.USER)
    with pytest.raises(LedgerError, match=r"'zero_out', 'user'.*expected one of"):
        FileLedger(tmp_path / "ledger")


def test_a_file_locked_for_too_long_is_an_error_and_nothing_is_begun(tmp_path, monkeypatch):
    ledger = FileLedger(tmp_path / "ledger")
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.05)
    with closing(sqlite3.connect(tmp_path / "ledger", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerError, match=r"locked by another process.*Nothing was begun"):
            ledger.begin(STEP)
    assert ledger.steps == 0


def test_a_write_that_fails_begins_nothing_and_the_next_one_counts_once(tmp_path, monkeypatch):
    ledger = FileLedger(tmp_path / "ledger")
    ledger.begin(STEP)
    write = Mirror.write

    def failing(self, *args):
        write(self, *args)
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Mirror, "write", failing)
    with pytest.raises(LedgerError, match="disk I/O error"):
        ledger.begin(STEP)
    monkeypatch.setattr(Mirror, "write", write)
    ledger.begin(STEP)
    assert total(tmp_path / "ledger") == ledger.steps == 2
    assert ledger.marks == ()


def test_bad_counts_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="whole number"):
        FileLedger(tmp_path / "ledger").begin(STEP, 0)
    with pytest.raises(ConfigurationError, match="block must be"):
        FileLedger(tmp_path / "ledger", block=0)
    with pytest.raises(LedgerError, match="cannot be read or written"):
        FileLedger(tmp_path / "ledger").begin(STEP, 10**30)
    assert total(tmp_path / "ledger") == 0


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileLedger(tmp_path / "nowhere" / "ledger")


# -- planted bugs --------------------------------------------------------------------------------------------------


def test_the_tests_of_copies_put_back_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(Mirror, "_read_all", lambda self, connection, head: [setattr(self, "_seen", head)][:0])
    path = tmp_path / "ledger"
    ledger = FileLedger(path)
    ledger.begin(STEP, 3)
    shutil.copy(path, tmp_path / "copy")
    ledger.begin(STEP)
    shutil.copy(tmp_path / "copy", path)
    ledger.mark("any change")
    monkeypatch.undo()
    assert total(path) == 3, "one of four steps is gone"
