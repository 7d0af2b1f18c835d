"""The batch sampler: which examples make each batch of a pass, and the tickets that follow them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from privet._checks import check_count
from privet.errors import ConfigurationError, ProtocolError
from privet.noise.key import NoiseKey
from privet.noise.keystream import Keystream
from privet.sampling.base import Planned, Sampling, SpentOnce
from privet.sampling.draw import MOST_STEPS, address
from privet.sampling.physical import begin_of, stop_of
from privet.sampling.share import WHOLE, Share
from privet.sampling.users import RecordsOf, UsersRecords

__all__ = ["Drawn", "LogicalBatches", "Pass"]

Most = Callable[[], int | None]  # the examples that a physical batch may have now; None: all of its logical batch


class Drawn(NamedTuple):
    """A batch, or a physical part of one, that was drawn and not yet handed over."""

    place: int  # of the logical batch in the pass
    size: int
    first: bool  # whether it begins its logical batch
    last: bool  # whether it ends it
    sampling: Sampling  # the law that it was drawn under
    digest: int = 0  # of the whole logical batch, where ranks share it
    owner: npt.NDArray[np.int64] | None = None  # (size,): which of its users each record belongs to
    loaded: bool = True  # whether the loader loads something for it: if it is empty, an example to be thrown away


class Pass:
    """One pass over the data: the batches that were drawn and not yet handed over."""

    def __init__(self, batches: LogicalBatches, *, number: int, first: int) -> None:
        self._batches = batches
        self.number = number
        self.drawn: deque[Drawn] = deque()  # empty batches included
        self._next = first
        self.most: Most | None = None  # asked before each part is drawn
        self.started = False

    def draw(self) -> Iterator[list[int]]:
        """Yields the examples of this share of every batch, in parts; `drawn` also learns of shares that have none."""
        self.started = True
        while self._next < self._batches.steps:
            index = self._next
            self._next += 1
            sampling = self._batches.sampling
            whole = self._batches.examples(self.number, index)
            share, evenly = self._batches.share, self._batches.evenly
            if self._batches.users is None:
                digest, examples, owner = share.digest(whole), share.of(whole), None
            else:
                (everybody, _), (examples, owner) = self._batches.records(whole, self.number, index)
                digest = share.digest(everybody)
            size = share.largest(whole) if share.together else len(examples)
            first = True
            for start, stop, last in self._cuts(size, owner):
                part, whose = examples[start:stop], None if owner is None else owner[start:stop] - owner[start:stop][:1]
                loaded = bool(part) or evenly
                self.drawn.append(Drawn(index, len(part), first, last, sampling, digest, whose, loaded=loaded))
                if loaded:
                    yield part or [share.readable]
                first = False

    def _cuts(self, size: int, owner: npt.NDArray[np.int64] | None) -> Iterator[tuple[int, int, bool]]:
        """Yields where each part of a batch begins and ends, and whether it is the last."""
        parts = self._batches.parts
        if parts > 1:  # so many, whatever the size, which is secret
            cuts = [begin_of(size * i // parts, owner) for i in range(parts + 1)]
            yield from ((cuts[i], cuts[i + 1], i == parts - 1) for i in range(parts))
            return
        start, last = 0, False
        while not last:
            most = (self.most() if self.most else None) or size
            stop = stop_of(start, size, most=most, owner=owner)
            last = stop >= size
            yield start, stop, last
            start = stop


@final
class LogicalBatches(Sampler[list[int]]):
    """Logical batches as a function of (key, pass, index), so that prefetching changes nothing.

    Each iteration is a pass with a number of its own: two at once draw different batches.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        key: NoiseKey,
        size: int,  # examples to draw from, or users
        steps: int,  # batches in a pass
        share: Share = WHOLE,  # the part of each batch that is handed over here
        parts: int = 1,  # physical batches that each is handed over in; 1: in one, or cut to a size
        users: UsersRecords | None = None,  # the records of those who are drawn, where they are not examples
    ) -> None:
        key.claim("sampling")
        self._key = key
        self._stream = Keystream(key, purpose="sampling")
        self._size = check_count("number of examples", size, least=1)
        self.steps = check_count("steps", steps, least=1)  # batches in a pass
        self.parts = check_count("parts", parts, least=1)
        if steps > MOST_STEPS:
            raise ConfigurationError(f"A pass has at most 2**32 batches, got {steps}: give a number of steps.")
        self.sampling = sampling
        self.share = share
        self.users = users
        # How far ahead of the training batches are drawn must not depend on which are empty once the law may change: a
        # rate that holds from one step on or the next, depending on who was sampled, would tell who was.
        self.evenly = False
        self.passes = 0  # begun
        self._pending: Pass | None = None
        self._resumed_at = 0
        self._shared: tuple[tuple[int, int], object] | None = None  # of the pass that was drawn from last
        self._skip_spent()

    @property
    def predictable(self) -> bool:
        """Returns whether the batches are reproducible, and so not secret."""
        return self._key.predictable

    def begin(self) -> Pass:
        """Returns the next pass, which the next iteration draws from."""
        self._skip_spent()
        first, self._resumed_at = self._resumed_at, 0
        if first == 0:
            if isinstance(self.sampling, Planned):
                self.sampling.refuse_pass(self.passes + 1)
            self.passes += 1
        self._pending = Pass(self, number=self.passes, first=first)
        return self._pending

    def __iter__(self) -> Iterator[list[int]]:
        # The loader begins a pass, and torch may ask for it twice before it draws: both get the pass that was begun.
        pending = self._pending
        if pending is None or pending.started:
            raise ProtocolError(
                "a loader was built anew from the parts of a private one (its dataset, batch_sampler and collate_fn). "
                "Its batches would be announced to nobody, and be billed as if nothing were sampled. Expected the "
                "loader that make_private returned, iterated over as it is. With accelerate, leave it out of "
                "accelerator.prepare and of skip_first_batches, and write `from privet.integrations.accelerate import "
                "prepare` and `model, optimizer, loader = prepare(accelerator, engine, module=model, "
                "optimizer=optimizer, data_loader=loader, noise_multiplier=..., max_grad_norm=...)`."
            )
        return pending.draw()

    def __len__(self) -> int:
        return self.steps * self.parts

    def examples(self, number: int, index: int) -> list[int]:
        """Returns the examples of one whole batch of one pass, those of other shares included."""
        wanted = (self._key.generation, number)  # a fresh key has another order
        if self._shared is None or self._shared[0] != wanted:
            self._shared = (wanted, self.sampling.shared(self._stream, size=self._size, number=number))
        drawn = self.sampling.draw(self._stream, size=self._size, number=number, index=index, shared=self._shared[1])
        # An example that is in a batch twice would move its sum twice as far as the clip norm says.
        if len(set(drawn)) != len(drawn) or (drawn and not 0 <= min(drawn) <= max(drawn) < self._size):
            raise ConfigurationError(
                f"{self.sampling} drew an example twice, or an index outside of the {self._size} examples. Expected "
                "each example at most once, by an index from 0. Correct its draw method; nothing was handed over."
            )
        return drawn

    def records(self, whole: list[int], number: int, index: int) -> tuple[RecordsOf, RecordsOf]:
        """Returns the records of the users of a batch: of all of them, and of those of this share."""
        assert self.users is not None
        records, owner = found = self.users.drawn(self._stream, whole, step=address(number, index))
        if self.share.ranks == 1:
            return found, found
        own = np.asarray(self.share.of(list(range(len(whole)))), dtype=np.int64)  # whole users: each has one rank
        mine = np.isin(owner, own)
        return found, RecordsOf(np.asarray(records)[mine].tolist(), np.searchsorted(own, owner[mine]))

    def state_dict(self, *, handed_over: int) -> dict[str, Any]:
        """Returns what a resumed run needs, never the key; `handed_over` batches of the current pass are done."""
        return {
            "passes": self.passes,
            "handed_over": handed_over,
            "fingerprint": self._key.fingerprint(),
            "size": self._size,
            "steps": self.steps,
            "sampling": repr(self.sampling),
            **({} if self.users is None else {"users": repr(self.users)}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes: the reproducible run exactly; any other with a fresh key, and a new pass where its order is lost."""
        for name, own in {"users": None, **self.state_dict(handed_over=0)}.items():
            if name not in {"passes", "handed_over"} and state.get(name) != own:
                raise ConfigurationError(
                    f"The state of this loader was saved with {name} = {state.get(name)!r}, and the loader has "
                    f"{own!r}: build it with the same dataset, batch size and sampling, and the same kind of key."
                )
        self.passes = check_count("passes", state["passes"])
        handed_over = check_count("handed_over", state["handed_over"])
        self._key.renew()
        # In a new order, examples of the first part of the pass could come again: only a new pass is billed for that.
        order_lost = not self.sampling.resumable and not self._key.predictable
        self._resumed_at = 0 if order_lost or handed_over >= self.steps else handed_over
        self._pending = None
        self._skip_spent(handed_over=max(0, self.passes - 1) * self.steps + handed_over)

    def _skip_spent(self, *, handed_over: int = 0) -> None:
        """Goes to the first batch that no run was given, where batches were drawn before the run.

        Args:
            handed_over: how many batches a run was given, as far as is known otherwise.
        """
        if not isinstance(self.sampling, SpentOnce):
            return
        self.passes, self._resumed_at = self.sampling.position(self.steps)
        spent = self.passes * self.steps if self._resumed_at == 0 else (self.passes - 1) * self.steps + self._resumed_at
        if spent < handed_over:
            raise ConfigurationError(
                f"{handed_over} batches of the schedule were handed over when the state was saved, and its folder says "
                f"{spent}. Expected the folder itself, not an older copy: its batches would be used twice. Resume with "
                "the folder that the run used, or draw a new schedule."
            )
