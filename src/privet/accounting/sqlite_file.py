"""One SQLite file that is a ledger: how it is made, opened, locked, and known to be the one it was.

The file is opened for each transaction and closed after it. So it is always the file that the path names now, no
connection outlives a fork, and nothing but the file itself lies in the folder between transactions.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from privet.accounting.record import LOCK
from privet.errors import LedgerError

__all__ = ["LedgerFile"]

T = TypeVar("T")
_APPLICATION = 0x70764C67  # marks the file, in SQLite's own header, as a ledger of privet
_PATIENCE = 600.0  # seconds to wait for other processes, which may ask their accountants in the meantime
_SCHEMA = (
    "CREATE TABLE head (version INTEGER, relation TEXT, unit TEXT, changes INTEGER, digest TEXT)",
    # A row is a phase: how often `event` was begun, in one go, as the phase number `place` of `run`.
    (
        "CREATE TABLE phase (id INTEGER PRIMARY KEY, run TEXT, place INTEGER, event TEXT, count INTEGER,"
        " changed INTEGER, UNIQUE (run, place))"
    ),
    "CREATE TABLE mark (text TEXT PRIMARY KEY, changed INTEGER) WITHOUT ROWID",
    "CREATE INDEX phase_changed ON phase (changed)",
    "CREATE INDEX mark_changed ON mark (changed)",
)


class LedgerFile:
    """Makes or opens the file, and runs functions inside of transactions on it.

    Guarantees: a transaction is on the disk when `transact` returns, whole, or it has left nothing. A file with two
    hard links is refused, because the journal that a kill leaves is found by the name of the file only.

    Args:
        path: the file, made if it does not exist. It is absolute and has no links in it, so that neither a link nor a
            `chdir` leads to another file or another journal.
        fill: writes the first rows of a new file; None to read a file that exists, which nothing then changes.
    """

    def __init__(self, path: Path, fill: Callable[[sqlite3.Connection], None] | None) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._mode = "ro" if fill is None else "rw"
        with LOCK:
            if fill is None:
                self.transact(self._check, write=False)
                return
            try:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:
                self._wait_until_filled()
                self.transact(self._check, write=False)
            else:
                self._make(fill)

    @property
    def replaced(self) -> bool:
        """Whether the path names another file now than in the last transaction."""
        return self._identity != self._look()

    def transact(self, work: Callable[[sqlite3.Connection], T], *, write: bool = True) -> T:
        """Runs `work` in a transaction and returns its result. Writers wait for one another.

        Raises:
            LedgerError: if the file is gone, linked, locked for too long, or not a sound ledger. It is left as it was.
        """
        with LOCK:
            before = self._look()
            try:
                with contextlib.closing(self._open()) as connection:
                    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                    try:
                        result = work(connection)
                        connection.execute("COMMIT")
                    except BaseException:
                        if connection.in_transaction:
                            connection.execute("ROLLBACK")
                        raise
            except (sqlite3.Error, OverflowError) as error:
                raise self._explained(error) from error
            self._identity = before
            return result

    def _open(self) -> sqlite3.Connection:
        # By URI with a mode, because an ordinary connection makes a file that is missing.
        connection = sqlite3.connect(
            self.path.as_uri() + f"?mode={self._mode}",
            uri=True,
            timeout=_PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
        if self._mode == "ro":
            return connection
        try:
            # A rollback journal, not a write-ahead log: the log is not safe on network drives, and a copy of the file
            # alone would lack what the log holds. EXTRA is FULL, and flushes the folder once the journal is gone from
            # it; a journal that came back after a power failure would undo the last step.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make(self, fill: Callable[[sqlite3.Connection], None]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            for statement in _SCHEMA:
                connection.execute(statement)
            fill(connection)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")

        try:
            with contextlib.closing(self._open()) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                work(connection)
                connection.execute("COMMIT")
        except BaseException:
            self.path.unlink(missing_ok=True)  # nobody has begun anything in it
            raise
        self._identity = self._look()

    def _wait_until_filled(self) -> None:
        """Waits a little for the process that is making the file."""
        patience = time.monotonic() + 5.0
        while self.path.exists() and self.path.stat().st_size == 0 and time.monotonic() < patience:
            time.sleep(0.01)

    def _look(self) -> tuple[int, int]:
        """Returns which file the path names, by device and inode, after checking that it can be a ledger."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise LedgerError(
                f"{self.path} is gone, and with it the steps it held. Put it back, from a copy if need be: a run that "
                "is still on writes again what it knows of."
            ) from None
        if not stat.S_ISREG(found.st_mode):
            raise LedgerError(f"{self.path} is not a regular file. Give the path of a file for the ledger.")
        if found.st_nlink > 1:
            raise LedgerError(
                f"{self.path} has {found.st_nlink} hard links, and a ledger must have one name: what a kill leaves to "
                "be undone is found by the file's name. Remove the other names; symbolic links are fine."
            )
        if found.st_size == 0:
            raise LedgerError(
                f"{self.path} is empty: it was cut, or a kill stopped its making. Put a copy back; delete it only if "
                "no run has ever used it."
            )
        return found.st_dev, found.st_ino

    def _check(self, connection: sqlite3.Connection) -> None:
        """Raises unless every page is sound and the file was made by a ledger."""
        found = connection.execute("PRAGMA application_id").fetchone()[0]
        if found != _APPLICATION:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            raise LedgerError(
                f"{self.path} is an SQLite file but no ledger: its mark is {found:#x}, not {_APPLICATION:#x}, and its "
                f"tables are {tables}. Give another path."
            )
        problems = [text for (text,) in connection.execute("PRAGMA integrity_check(3)")]
        if problems != ["ok"]:
            raise LedgerError(f"{self.path} is damaged: {'; '.join(problems)}. Put a copy back.")

    def _explained(self, error: Exception) -> LedgerError:
        """Returns what SQLite's error means for a ledger."""
        text = str(error)
        if "locked" in text:
            return LedgerError(f"{self.path} was locked by another process for {_PATIENCE:g} s. Nothing was begun.")
        if "not a database" not in text:
            return LedgerError(f"{self.path} cannot be read or written as a ledger: {text}. Nothing was begun.")
        # No process can have it open as a database, so reading it here drops nobody's lock.
        beginning = self.path.read_bytes()[:200]
        if b'"ledger": "privet"' in beginning:
            return LedgerError(
                f"{self.path} is a ledger of version 1, in text. This version keeps ledgers in SQLite files. Make a "
                "new FileLedger at another path, and begin in it what the lines of the old one say: docs/accounting.md "
                "has the lines of Python that do it."
            )
        return LedgerError(f"{self.path} is damaged, or not a ledger: it begins with {beginning[:20]!r}. {text}.")
