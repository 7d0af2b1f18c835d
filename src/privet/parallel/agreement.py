"""What ranks tell each other beside sums: that they are at the same step, and that one of them failed.

    what happens                                    result
    one rank raises where all meet                  that rank raises its error, the others RanksError that names it
    ranks are at different steps or batches         RanksError on all of them
    a rank has left, or does not answer in time     RanksError; every later meeting raises at once

Every meeting is one exchange of a few numbers between hosts, over gloo, so that no device has to be waited for. Only if
something is wrong does a second exchange follow, of words.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist

from privet.errors import PrivetError, RanksError
from privet.parallel.role import Due
from privet.sampling.base import BatchTicket

__all__ = ["Agreement", "hashed"]

T = TypeVar("T")
_NOTHING = Due(ticket=None, step=0, words=str)


def hashed(text: str) -> int:
    """Returns a number of 63 bits, the same on every machine, that other texts do not have."""
    return int.from_bytes(hashlib.blake2b(_plain(text).encode(), digest_size=8).digest(), "big") >> 1


def _plain(text: str) -> str:
    """Returns a text without the addresses in memory that Python shows for some objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _listed(ranks: Sequence[int]) -> str:
    """Returns ranks in words, at most eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


@final
class Agreement:
    """The meetings of the ranks of one group.

    Args:
        group: of the ranks, with the gloo backend.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._lost: str | None = None

    # -- the exchanges -----------------------------------------------------------------------------------------------

    def guarded(self, exchange: Callable[[], T]) -> T:
        """Returns what an exchange with other ranks returns.

        Raises:
            RanksError: if it failed, now or before: then nobody knows at which exchange the other ranks are.
        """
        if self._lost is None:
            try:
                return exchange()
            except PrivetError:  # of this rank alone; the exchange itself is whole
                raise
            except RuntimeError as error:
                self._lost = str(error)
                failure: RuntimeError | None = error
        else:
            failure = None
        raise RanksError(
            f"rank {self.rank} lost the other {self.size - 1} of its group: one of them ended, failed, or did not "
            "answer within the timeout of the process group. Expected every rank to run the same program to its end. "
            "Look for the first error of another rank, and resume all ranks from a checkpoint. "
            f"Steps on the ledger stay billed. The error was: {self._lost}"
        ) from failure

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of every rank, each of which gives as many."""
        mine = torch.tensor(own, dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self.guarded(lambda: dist.all_gather(gathered, mine, group=self._group))
        return [found.tolist() for found in gathered]

    def objects(self, own: object) -> list[Any]:
        """Returns an object of every rank."""
        found: list[Any] = [None] * self.size
        self.guarded(lambda: dist.all_gather_object(found, own, group=self._group))
        return found

    def from_rank(self, rank: int, own: T) -> T:
        """Returns the object of one rank."""
        held = [own]
        self.guarded(lambda: dist.broadcast_object_list(held, group=self._group, group_src=rank))
        return held[0]

    def leave(self, error: Exception) -> None:
        """Takes no part in any meeting from now on: this rank failed where the others cannot be told."""
        if self._lost is None:
            self._lost = f"{type(error).__name__}: {error}"
            error.add_note(
                "The other ranks wait in a forward or backward for this one. They fail once this process ends, or "
                "after the timeout of their process group. End all ranks, and resume from a checkpoint."
            )

    # -- errors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes an error inside of the context on one rank an error on all. Nothing inside may talk to other ranks."""
        with self.telling():
            yield
        self._heed(self.numbers(self._report(failed=False)), None)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Makes an error inside of the context an error of the other ranks too, where they meet next."""
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """Tells the other ranks, at their next meeting, that this one failed; `error` is what is raised here."""
        if self._lost is None:
            try:
                self._heed(self.numbers(self._report(failed=True)), error)
            except RanksError as lost:
                error.add_note(str(lost))

    def _heed(self, reports: list[list[int]], error: Exception | None) -> None:
        """Raises RanksError if another rank reports a failure and this one has no error of its own to raise."""
        failed = [rank for rank, report in enumerate(reports) if report[0]]
        if not failed:
            return
        words = self.objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            raise RanksError(
                f"{_listed(failed)} failed, so that this step cannot be taken on any rank. Nothing of it was released. "
                f"Rank {failed[0]} raised {words[failed[0]]}"
            )

    @staticmethod
    def _report(*, failed: bool, due: Due = _NOTHING) -> list[int]:
        """Returns what a rank says of itself: all meetings have reports of one form, so that they fit each other."""
        ticket = due.ticket
        batch = (0, 0, 0) if ticket is None else (ticket.passes, ticket.index, ticket.digest)
        return [int(failed), due.step, hashed(due.words()), int(ticket is not None), *batch]

    # -- what must be the same ---------------------------------------------------------------------------------------

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raises RanksError on every rank if the facts, compared as text, are not the same on all of them."""
        said = {name: _plain(str(value)) for name, value in facts.items()}
        own = Due(ticket=None, step=0, words=lambda: repr(sorted(said.items())))
        reports = self.numbers(self._report(failed=False, due=own))
        self._heed(reports, None)
        if len({report[2] for report in reports}) == 1:
            return
        found = self.objects(said)
        differing = [
            f"{name}: {self._groups([each.get(name, 'nothing') for each in found])}"
            for name in sorted({name for each in found for name in each})
            if len({each.get(name) for each in found}) > 1
        ]
        raise RanksError(
            "the ranks of this run were not given the same. "
            + "; ".join(differing)
            + ". Expected the same on every rank. Run the same program everywhere, with the same arguments and data."
        )

    @staticmethod
    def _groups(values: Sequence[str]) -> str:
        """Returns which ranks have which value, the most common value first."""
        said = []
        for value, _ in Counter(values).most_common(4):
            who = _listed([rank for rank, each in enumerate(values) if each == value])
            said.append(f"{value if len(value) <= 200 else value[:200] + '...'} on {who}")
        return ", ".join(said)

    def numbers_at(self, place: str, own: int) -> list[int]:
        """Returns a number of every rank, at a place of the program that all have come to.

        Raises:
            RanksError: if another rank failed, or is at another place.
        """
        # Negative, so that a rank that is about to release a step sees at once that this is another meeting.
        due = Due(ticket=None, step=-1 - own, words=lambda: place)
        reports = self.numbers(self._report(failed=False, due=due))
        self._heed(reports, None)
        if len({report[2] for report in reports}) > 1:
            raise RanksError(
                f"ranks are at different places of the program; this one asks for {place}. Expected every rank to run "
                "the same forwards, backwards and steps. Leave no batch out on one rank alone."
            )
        return [-1 - report[1] for report in reports]

    def agreed(self, due: Callable[[], Due]) -> BatchTicket | None:
        """Returns the ticket of the step that all ranks are about to take, or None if none of them has one.

        Raises:
            RanksError: if another rank failed, is about to take another step, or has a batch of another kind.
            What `due` raises is raised here.
        """
        with self.telling():
            own = due()
        reports = self.numbers(self._report(failed=False, due=own))
        self._heed(reports, None)
        for place, what in ((1, "step"), (2, "mechanism")):
            if len({report[place] for report in reports}) > 1:
                shown = [str(report[place]) for report in reports]
                if what == "mechanism":
                    shown = self.objects(_plain(own.words()))
                raise RanksError(
                    f"ranks are about to release different steps. {what}: {self._groups(shown)}. Expected the same "
                    "on every rank. Call schedules, optimizers and checkpoints on every rank alike."
                )
        own_batches = [rank for rank, report in enumerate(reports) if not report[3]]
        if len(own_batches) == self.size:
            return None
        if own_batches:  # an example may be in one of these and in the share of another rank: it would count twice
            raise RanksError(
                f"{_listed(own_batches)} trained on a batch that did not come, whole and fresh, from the private "
                "loader, and the other ranks on their shares of one that did: an example may be in both. Expected "
                "batches of the private loader on every rank, or on none. Nothing was released."
            )
        batches = [str(tuple(report[4:6])) for report in reports]
        if len(set(batches)) > 1:
            raise RanksError(
                f"ranks are at different batches. (pass, index): {self._groups(batches)}. Expected one step on each "
                "batch of the private loader, on every rank. Leave no batch out on one rank alone."
            )
        if len({report[6] for report in reports}) > 1:
            raise RanksError(
                "ranks drew different batches from one key, so that an example could be in two shares, or in none. "
                "Expected machines on which the same versions of Python and NumPy draw the same. Use the same image "
                "and processor family on every rank, and a private loader that every rank has made and used alike."
            )
        return own.ticket
