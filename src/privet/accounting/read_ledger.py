"""A ledger's file, read: for people who check a run and must not change its record."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from privet.accounting.accountant import Accountant
from privet.accounting.event import Relation, Unit
from privet.accounting.ledger import Ledger
from privet.accounting.mirror import Mirror
from privet.accounting.sqlite_file import LedgerFile
from privet.errors import LedgerError

__all__ = ["read_ledger"]


def read_ledger(path: str | os.PathLike[str], *, accountant: str | Accountant = "pld") -> Ledger:
    """Returns what a file of `FileLedger` holds, as a ledger in memory under the file's own relation and unit.

    The file is neither made nor changed, and may lie where nobody can write.

    Raises:
        LedgerError: if there is no such file, or it is damaged, changed by hand, or no ledger.

    Example:
        >>> import tempfile
        >>> from privet.accounting import FileLedger, GaussianEvent, read_ledger
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     FileLedger(f"{folder}/census.ledger").begin(GaussianEvent(1.0))
        ...     read_ledger(f"{folder}/census.ledger").steps
        1
    """
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise LedgerError(f"There is no ledger at {resolved}. Give the path of a file that a FileLedger has written.")

    def read(connection: sqlite3.Connection) -> Ledger:
        heads = connection.execute("SELECT relation, unit FROM head").fetchall()
        try:
            ((relation, unit),) = [(Relation(relation), Unit(unit)) for relation, unit in heads]
        except ValueError as error:
            raise LedgerError(f"{resolved} is damaged: its head is {heads} ({error}). Put a copy back.") from None
        mirror = Mirror(resolved, relation.value, unit.value)
        mirror.refresh(connection)  # from an empty record: it checks every row and the digest, and writes nothing
        found = Ledger(relation=relation, unit=unit, accountant=accountant)
        found.load_state_dict(mirror.record.state(relation.value, unit.value))
        return found

    return LedgerFile(resolved, None).transact(read, write=False)
