"""The private loader: a user's own DataLoader, with batches drawn as the accounting says, each announced.

Guarantees
----------
Batches come from a key of the operating system, never from torch's global seed or the loader's `generator` (which
still seeds the workers). Every batch handed over is announced first, in order, by a `BatchTicket`, whatever the workers
prefetch; and its number of examples is checked against the one that was drawn.

An empty batch never goes through the workers: it is made here, with the structure of any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

from torch.utils.data import DataLoader

from privet._checks import check_count
from privet.errors import ProtocolError
from privet.sampling.base import BatchTicket, Sampling, SpentOnce, refuse_change
from privet.sampling.empty import EmptyBatch
from privet.sampling.recognition import Leaves
from privet.sampling.sampler import Drawn, LogicalBatches
from privet.sampling.users import Users

__all__ = ["PrivateLoader"]

Listener = Callable[[BatchTicket], None]
_END = object()
_SOURCES = itertools.count(1)  # numbers of loaders: every loader counts its passes from 1, and each pass is billed


class _Counted:
    """A collate function that says how many examples it was given."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, examples: list[Any]) -> tuple[int, Any]:
        return len(examples), self.collate_fn(examples)


@final
class PrivateLoader(DataLoader[Any]):
    """A DataLoader whose batches are drawn and announced for privacy. Built by `privatize_loader` and `loader_for`."""

    def __init__(
        self,
        dataset: Any,
        *,
        batches: LogicalBatches,
        expected_batch_size: float,
        dataset_size: int,
        collate_fn: Callable[[list[Any]], Any],
        options: Mapping[str, Any],  # of torch's DataLoader, those that cannot change what is drawn
    ) -> None:
        self._batches = batches
        self._empty = EmptyBatch(dataset, collate_fn, example=batches.share.readable)
        self._listeners: list[Listener] = []
        self._steps_done = 0
        self._handed_over = 0
        self.expected_batch_size = expected_batch_size
        self.dataset_size = dataset_size
        self._source = next(_SOURCES)
        self._spent: tuple[int, int] | None = None  # the batch that was marked last
        if batches.sampling.random_size or batches.parts > 1:
            self._empty.make()  # fails here rather than at a rare batch
        super().__init__(dataset, batch_sampler=batches, collate_fn=_Counted(collate_fn), **options)
        if isinstance(expected_batch_size, int):
            # torch writes None beside a batch sampler, and refuses assignment; scripts read the size all the same.
            self.__dict__["batch_size"] = expected_batch_size // batches.parts

    @property
    def sampling(self) -> Sampling:
        """Returns how the batches are formed."""
        return self._batches.sampling

    @property
    def predictable(self) -> bool:
        """Returns whether the batches are reproducible, and so not secret."""
        return self._batches.predictable

    @property
    def users(self) -> Users | None:
        """Returns whose records are whose, where a user is the unit of privacy, and is drawn as a whole."""
        return None if self._batches.users is None else self._batches.users.users

    @property
    def steps_per_pass(self) -> int:
        """Returns the logical batches of a pass. `len(loader)` counts what it hands over: each is in `parts` pieces."""
        return self._batches.steps

    @property
    def parts(self) -> int:
        """Returns how many physical batches each logical batch is handed over in, where that was declared; else 1."""
        return self._batches.parts

    @property
    def passes_begun(self) -> int:
        """Returns how many passes over the data have begun."""
        return self._batches.passes

    @property
    def facts(self) -> dict[str, object]:
        """Returns what must be the same on all ranks for them to draw the same batches."""
        state = self._batches.state_dict(handed_over=0)
        shards = getattr(self._batches.share, "starts", None)
        return {
            **state,
            "dataset_size": self.dataset_size,
            "num_workers": self.num_workers,
            "shards": shards,
            "parts": self.parts,
        }

    def on_batch(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener(ticket)` just before each batch is handed over; returns a function that ends this."""
        self._listeners.append(listener)
        return lambda: self.forget(listener)

    def forget(self, listener: Listener) -> None:
        """Calls a listener no more."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for ticket, batch in self.drawn():
            self.announce(ticket, batch)
            yield batch

    def drawn(self, most: Callable[[], int | None] | None = None) -> Iterator[tuple[BatchTicket, Any]]:
        """Yields a pass of batches, in parts of at most `most()` examples, each with a ticket yet to be announced."""
        run = self._batches.begin()
        run.most = most
        inner: Iterator[Any] = super().__iter__()
        while True:
            counted: Any = next(inner, _END)
            # What was drawn before this batch and is empty never went through the workers: it comes first.
            while run.drawn:
                found = run.drawn.popleft()
                if found.size:
                    yield self._ticket(run.number, found, counted), counted[1]
                    break
                yield self._ticket(run.number, found, (0, None)), self._empty.make()
                if found.loaded:
                    break
            if counted is _END:
                return

    def _ticket(self, number: int, found: Drawn, counted: Any) -> BatchTicket:
        """Returns the ticket of a batch that has as many examples as were drawn."""
        if counted is _END or counted[0] != found.size:
            raise ProtocolError(
                f"Batch {found.place} of pass {number} was drawn with another number of examples than arrived: "
                "the loader's workers lost or reordered batches. Do not change the loader while it runs."
            )
        return BatchTicket(
            step=self._steps_done,
            index=found.place,
            passes=number,
            size=found.size,
            owner=found.owner,
            first=found.first,
            last=found.last,
            sampling=found.sampling,
            digest=found.digest,
            source=self._source,
            parts=self._batches.parts,
            ends_pass=found.place == self._batches.steps - 1,
        )

    def announce(self, ticket: BatchTicket, batch: Any) -> None:
        """Tells the listeners of a batch that is handed over now, and counts it if it ends a logical batch."""
        self._spend(ticket)
        ticket = replace(ticket, leaves=Leaves(batch, rows=None if self.users is None else ticket.size))
        if ticket.last:
            self._steps_done = max(self._steps_done, ticket.step + 1)
            if (
                ticket.passes == self._batches.passes
            ):  # an older pass may run beside the newest, from which a run resumes
                self._handed_over = ticket.index + 1
        for listener in tuple(self._listeners):
            listener(ticket)

    def _spend(self, ticket: BatchTicket) -> None:
        """Marks a batch that was drawn before the run as spent, when its first part is handed over."""
        place, sampling = (ticket.passes, ticket.index), self._batches.sampling
        # A part for which memory ran out comes again, and is in no sum: then the batch is marked already.
        if ticket.first and place != self._spent and isinstance(sampling, SpentOnce):
            sampling.spend(*place, record=self._batches.share.rank == 0)
            self._spent = place

    def structures(self) -> tuple[Any, Any]:
        """Returns what a batch of one example looks like, and one of two, without their contents."""
        return self._empty.structures()

    @property
    def resampled(self) -> bool:
        """Returns whether the sampling rate is to change."""
        return self._batches.evenly

    def expect_resampling(self) -> None:
        """Makes how far ahead batches are drawn independent of which of them are empty. Call before a pass begins."""
        self._batches.evenly = True

    def resample(self, sampling: Sampling) -> None:
        """Draws all batches from now on under another rate; a pass keeps its number of steps.

        Batches that the workers have prefetched keep the rate that they were drawn under, which their tickets tell.

        Raises:
            ConfigurationError: if more than the rate differs.
        """
        refuse_change(self._batches.sampling, sampling)
        self.expect_resampling()
        self._batches.sampling = sampling
        self.expected_batch_size = sampling.expected_batch_size(self.dataset_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""
        return {"steps": self._steps_done, "batches": self._batches.state_dict(handed_over=self._handed_over)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes: a reproducible run with its very next batch, any other with batches drawn afresh."""
        steps = check_count("steps", state["steps"])
        self._batches.load_state_dict(state["batches"])
        # A pass that was set back has its old number, and its batches may come again: it is billed as a new one.
        self._source = next(_SOURCES)
        self._steps_done = steps
        self._handed_over = state["batches"]["handed_over"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own listeners and key (see NoiseKey), and no running workers.
        return {**self.__dict__, "_listeners": [], "_iterator": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["_source"] = next(_SOURCES)  # its passes are others than those of the loader it was copied from
