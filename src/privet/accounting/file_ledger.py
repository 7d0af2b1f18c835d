"""A ledger in a file, shared by several runs on the same data.

Every change writes a whole new file beside the old one, flushes it to the disk and renames it into place, under a
lock: at any moment, after any kill, the path holds a complete ledger, and a step is in it before `begin` returns.
Runs of one mechanism are kept as a count, so the file stays small however long they are.

The file is text, one JSON object a line, each preceded by a checksum that also covers the lines before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from privet._checks import check_count
from privet.accounting.accountant import Accountant, get_accountant
from privet.accounting.event import Event, Relation, Unit
from privet.accounting.ledger import Budget, Phase, append, exceeded, phases_from, phases_to, spent
from privet.errors import ConfigurationError, LedgerError

__all__ = ["FileLedger"]

_VERSION = 1


class FileLedger:
    """The phases of every run that shares `path`, with the meaning of `Ledger`, over all runs together.

    Guarantees: never under-counts, under concurrent writers and a kill at any moment; a file that is damaged, cut or
    gone is refused with the line at fault, and never repaired.

    Args:
        path: The file, made if it does not exist.
        relation: The neighbouring relation; must be the file's where it exists.
        unit: The unit of privacy; must be the file's where it exists.
        accountant: What `epsilon` and the budget use.
        budget: The most that all runs together may spend.
        run: A name for this run's lines; by default made from host, process and time.
        block: How many steps to put on record at once. More than 1 saves writes; what a run that ends early has not
            used of its last block stays billed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        unit: Unit = Unit.EXAMPLE,
        accountant: str | Accountant = "pld",
        budget: Budget | None = None,
        run: str | None = None,
        block: int = 1,
    ) -> None:
        self.path = Path(path)
        self.relation = Relation(relation)
        self.unit = Unit(unit)
        self.accountant = get_accountant(accountant)
        self.budget = budget
        self.block = check_count("block", block, 1)
        self.run = run if run is not None else f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._process = os.getpid()
        self._reserved: dict[Event, int] = {}
        with self._locked():
            if self.path.exists():
                self._read()
            else:
                self._write({})

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of all runs, as the file has them now."""
        with self._locked():
            runs = self._read()
        return tuple(phase for phases in runs.values() for phase in phases)

    def begin(self, event: Event, count: int = 1) -> None:
        """Records that `count` steps or passes of `event` begin. Call it before their noise is drawn.

        Raises:
            BudgetExceededError: if they would exceed the budget; the file is then unchanged.
            LedgerError: if the file is damaged or gone; the file is then left alone.
        """
        phase = Phase(event, check_count("count", count, 1))
        if os.getpid() != self._process:
            # A forked child must not spend what its parent reserved.
            self._process, self._reserved = os.getpid(), {}
        if self._reserved.get(event, 0) >= count:
            self._reserved[event] -= count
            return
        with self._locked():
            runs = self._read()
            phase = self._affordable(phase, [each for phases in runs.values() for each in phases])
            append(runs.setdefault(self.run, []), phase)
            self._write(runs)
        # What was left of an earlier block stays usable.
        self._reserved[event] = self._reserved.get(event, 0) + phase.count - count

    def event(self) -> Event:
        """Returns everything that all runs have begun as one event."""
        return spent(self.phases)

    def epsilon(
        self,
        delta: float,
        *,
        accountant: str | Accountant | None = None,
        relation: Relation | None = None,
        group_size: int = 1,
    ) -> float:
        """Returns an upper bound on ε at δ of everything that all runs have begun."""
        chosen = self.accountant if accountant is None else get_accountant(accountant)
        return chosen.epsilon(
            self.event(), delta, relation=self.relation if relation is None else relation, group_size=group_size
        )

    def _affordable(self, phase: Phase, begun: list[Phase]) -> Phase:
        """Returns what to put on record: a whole block if the budget has room for it, the steps asked for if not."""
        block = Phase(phase.event, max(phase.count, self.block))
        if self.budget is None:
            return block
        if exceeded(begun, block, self.budget, self.accountant, self.relation) is None:
            return block
        error = exceeded(begun, phase, self.budget, self.accountant, self.relation)
        if error is not None:
            raise error
        return phase

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock that all runs share. It is a file of its own, since the ledger's file is replaced."""
        try:
            import fcntl
        except ImportError:
            raise ConfigurationError("A FileLedger needs POSIX file locks; use a Ledger on this system.") from None
        descriptor = os.open(
            self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _header(self) -> dict[str, object]:
        return {
            "ledger": "privet",
            "version": _VERSION,
            "relation": self.relation.value,
            "unit": self.unit.value,
        }

    def _read(self) -> dict[str, list[Phase]]:
        """Returns the phases of each run, after checking every line."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise LedgerError(f"{self.path} is gone, and with it the steps it held; put it back.") from None
        except UnicodeDecodeError as error:
            line = self.path.read_bytes()[: error.start].count(b"\n") + 1
            raise LedgerError(f"{self.path}, line {line}: not text. The ledger is damaged.") from None
        lines = text.split("\n")
        if lines.pop() != "":
            raise LedgerError(f"{self.path}, line {len(lines) + 1}: cut short. The ledger is damaged.")
        values, chain = [], ""
        for number, each in enumerate(lines, start=1):
            digest, _, body = each.partition(" ")
            chain = _digest(chain, body)
            if digest != chain:
                raise LedgerError(f"{self.path}, line {number}: its checksum does not fit. The ledger is damaged.")
            values.append(self._parsed(number, body))
        if len(values) < 2 or values[-1] != {"end": len(values)}:
            raise LedgerError(f"{self.path}, line {len(values) + 1}: the last line is missing. The ledger is damaged.")
        if values[0] != self._header():
            raise LedgerError(f"{self.path}, line 1: expected the header {self._header()}, found {values[0]}.")
        runs: dict[str, list[Phase]] = {}
        for number, value in enumerate(values[1:-1], start=2):
            if set(value) != {"run", "phase"} or not isinstance(value["run"], str):
                raise LedgerError(f"{self.path}, line {number}: expected a run and its phase, found {value}.")
            try:
                runs.setdefault(value["run"], []).extend(phases_from([value["phase"]]))
            except LedgerError as error:
                raise LedgerError(f"{self.path}, line {number}: {error}") from error
        return runs

    def _parsed(self, number: int, body: str) -> dict[str, object]:
        try:
            value = json.loads(body)
        except json.JSONDecodeError as error:
            raise LedgerError(f"{self.path}, line {number}: not JSON ({error}). The ledger is damaged.") from None
        if not isinstance(value, dict):
            raise LedgerError(f"{self.path}, line {number}: expected an object, found {value!r}.")
        return value

    def _write(self, runs: dict[str, list[Phase]]) -> None:
        """Puts a new file in the place of the old one, on the disk before the rename and after it."""
        values: list[dict[str, object]] = [self._header()]
        values += [{"run": run, "phase": phase} for run, phases in runs.items() for phase in phases_to(phases)]
        values.append({"end": len(values) + 1})
        lines, chain = [], ""
        for value in values:
            body = json.dumps(value, allow_nan=False)
            chain = _digest(chain, body)
            lines.append(f"{chain} {body}\n")
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _digest(chain: str, body: str) -> str:
    return hashlib.sha256(f"{chain} {body}".encode()).hexdigest()[:16]
