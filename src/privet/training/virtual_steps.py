"""Virtual steps at the paper's door: one logical batch in several physical ones, so that it fits into memory.

    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as loader:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

Guarantees
----------
Only the step of the last physical batch of a logical one releases anything: one line in the ledger, one noise, one step
of the optimizer. Every other `optimizer.step()` adds to the secret sum, and does nothing else. An example is in a sum
once, whatever fails. What is left unfinished is forgotten: a loop that is left early, an exception, a new pass.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from privet.batches.cut import cut_like
from privet.batches.out_of_memory import is_out_of_memory
from privet.errors import ConfigurationError, ProtocolError
from privet.sampling import BatchTicket, PrivateLoader
from privet.sampling.physical import PhysicalSize, tickets_of
from privet.training.chained import with_parts
from privet.training.collective import refuse_search
from privet.training.update import PrivateUpdate, update_of
from privet.training.whose import refuse_small

__all__ = ["BatchMemoryManager", "PhysicalLoader", "in_virtual_steps"]

Progress = Callable[[Iterable[int]], Iterable[int]]
_ACTIVE: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


@final
class BatchMemoryManager:
    """A context in which a private loader hands over physical batches, and the optimizer takes logical steps.

    Args:
        data_loader: the loader that make_private returned.
        max_physical_batch_size: the most examples in memory at once, or `"auto"`: the largest number that fits, found
            by halving. Then the body of the loop belongs into `with loader.attempt():`, which cures an out-of-memory.
        optimizer: the optimizer that make_private returned.
        progress: a progress bar such as `tqdm`: a function of an iterable of the pass's logical steps.

    It yields a `PhysicalLoader`. Its length is in logical steps; learning rate schedulers of torch that are stepped in
    the loop count logical steps too.
    """

    def __init__(
        self,
        *,
        data_loader: PrivateLoader,
        max_physical_batch_size: int | Literal["auto"],
        optimizer: torch.optim.Optimizer,
        progress: Progress | None = None,
    ) -> None:
        given: object = max_physical_batch_size
        if given is None:
            raise ConfigurationError(
                "max_physical_batch_size must be a whole number of at least 1, or 'auto', got None."
            )
        self._size = PhysicalSize("max_physical_batch_size", max_physical_batch_size)
        self._update = update_of(optimizer)
        loader: object = data_loader
        if not isinstance(loader, PrivateLoader) or not self._update.loaders.follows(data_loader):
            raise ConfigurationError(
                f"this {type(data_loader).__name__} is not the loader of the optimizer's module. Expected the one that "
                "make_private returned with it."
            )
        if self._update.parts > 1:
            raise ConfigurationError(
                f"BatchMemoryManager was given a loader of accumulate={self._update.parts}, which hands each logical "
                "batch over in that many parts already. Expected one of the two. For smaller parts raise accumulate; "
                "for parts of at most a given size leave it away."
            )
        refuse_small(data_loader.users, self._size)
        refuse_search("max_physical_batch_size", self._update.ranks.spread, search=self._size.auto)
        self._optimizer = optimizer
        self._loader = PhysicalLoader(
            data_loader, size=self._size, update=self._update, optimizer=optimizer, progress=progress
        )
        self._step: MethodType | None = None
        self._before: Any = None

    def __enter__(self) -> PhysicalLoader:
        """Replaces the optimizer's `step` until the context ends, and returns the loader of physical batches."""
        if self._optimizer in _ACTIVE:
            raise ProtocolError("this optimizer is in a BatchMemoryManager already. Expected one at a time.")
        _ACTIVE.add(self._optimizer)
        # The method is replaced on the object: torch's step hooks run inside of `step`, too late to leave it out.
        self._before = vars(self._optimizer).get("step")
        self._step = MethodType(_virtual(self._optimizer.step, self._update), self._optimizer)
        self._optimizer.step = self._step  # type: ignore[method-assign]
        return self._loader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Forgets a sum that was not released, and puts the optimizer's `step` back."""
        self._loader.end()
        # If a scheduler wrapped `step` in the meantime, its wrapper stays. It calls ours, which does nothing special
        # once no physical batch is to come.
        if vars(self._optimizer).get("step") is self._step:
            if self._before is None:
                del self._optimizer.step
            else:
                self._optimizer.step = self._before  # type: ignore[method-assign]
        self._step = None
        _ACTIVE.discard(self._optimizer)
        if error is not None and self._size.auto and is_out_of_memory(error):
            error.add_note(
                "Nothing of this logical batch was released. To go on with smaller physical batches instead, put the "
                "body of the loop into `with loader.attempt():`, where `loader` is what BatchMemoryManager yields."
            )


def in_virtual_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether a BatchMemoryManager has the optimizer now."""
    return optimizer in _ACTIVE


def _virtual(step: Callable[..., Any], update: PrivateUpdate) -> Callable[..., Any]:
    """Returns an optimizer's step that only accumulates while physical batches are still to come."""

    @functools.wraps(getattr(step, "__func__", step))
    def virtual(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not update.unfinished:
            return step(*args, **kwargs)
        closure = kwargs.get("closure", args[0] if args else None)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        update.accumulate()
        # A scheduler of torch warns if it is stepped before the optimizer, and looks for this mark.
        for each in with_parts(optimizer):
            each._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001
        return result

    return virtual


@final
class PhysicalLoader:
    """The physical batches of a private loader. Its length is the number of logical steps in a pass."""

    def __init__(
        self,
        loader: PrivateLoader,
        *,
        size: PhysicalSize,
        update: PrivateUpdate,
        optimizer: torch.optim.Optimizer,
        progress: Progress | None,
    ) -> None:
        self.loader = loader
        self._size = size
        self._update = update
        self._optimizer = optimizer
        self._progress = progress
        # The pass is not kept alive here, so that Python ends it as soon as the user's loop is left.
        self._running: weakref.ref[Generator[Any, None, None]] | None = None
        self._ticket: BatchTicket | None = None
        self._failed = False

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Any:
        """Returns the dataset."""
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Returns the expected size of a logical batch."""
        return self.loader.batch_size

    @property
    def physical_batch_size(self) -> int | None:
        """Returns the most examples that the next physical batch may have, or None if any number was found to fit."""
        return self._size.most

    @property
    def last(self) -> bool:
        """Returns whether the batch at hand is the last of its logical batch, so that its step releases."""
        return not self._update.unfinished

    def __iter__(self) -> Iterator[Any]:
        if self.loader.resampled and self.loader.num_workers > 0:
            raise ConfigurationError(
                "a schedule of the sampling rate with physical batches and workers: how far ahead the workers draw "
                "would depend on the sizes of batches, which are secret, and with it the rate of each step. Expected "
                "num_workers=0 here. Or schedule the rate without physical batches."
            )
        self.end()
        running = self._batches()
        self._running = weakref.ref(running)
        return running

    def end(self) -> None:
        """Ends the pass that is running, if any; what is unfinished of it is forgotten."""
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()
        self._running = None

    def _batches(self) -> Generator[Any, None, None]:
        bar = iter(self._progress(range(len(self))) if self._progress else range(len(self)))
        # A logical batch is handed over in parts. One that is too large for the size of now is cut again, and one for
        # which memory ran out comes back to the front of the queue, to be cut by the halved size.
        held = _HeldSchedulers(self._optimizer)
        try:
            for drawn in self.loader.drawn(lambda: self._size.most):
                if drawn[0].first:
                    next(bar, None)
                parts = deque([drawn])
                while parts:
                    ticket, batch = parts.popleft()
                    if self._size.most is not None and ticket.size > self._size.most:
                        parts.extendleft(reversed(self._cut(ticket, batch)))
                        continue
                    self._ticket, self._failed = ticket, False
                    self.loader.announce(ticket, batch)
                    if not ticket.last:
                        held.hold()
                    yield batch
                    held.restore()
                    if self._failed:
                        self._size.free()
                        parts.appendleft((ticket, batch))
            for _ in bar:
                pass
        finally:
            held.restore()
            self._update.forget()

    def _cut(self, ticket: BatchTicket, batch: Any) -> list[tuple[BatchTicket, Any]]:
        assert self._size.most is not None
        one, two = self.loader.structures()
        return [
            (part, cut_like(one, two, batch, start, stop)) for start, stop, part in tickets_of(ticket, self._size.most)
        ]

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A context for the body of the loop: if memory runs out in it, the batch comes again in halves.

        The examples of the batch are in no sum then, and no noise was drawn. With a size that was given, and for any
        other error, it does nothing.

        Raises:
            OutOfMemoryError: if a single example does not fit.
        """
        try:
            yield
        except Exception as error:
            if self._ticket is None or not self._size.auto or not is_out_of_memory(error) or not self._update.retract():
                raise
            self._failed = True
            self._size.halve(self._ticket.size, error)


class _HeldSchedulers:
    """Learning rate schedulers, held where they are: a step that they take before the logical one is undone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # A scheduler holds its optimizer, and an optimizer does not know its schedulers: all objects have to be asked.
        ours = {id(each) for each in with_parts(optimizer)}
        self._schedulers = [
            found
            for found in gc.get_objects()
            if issubclass(type(found), LRScheduler) and id(vars(found).get("optimizer")) in ours
        ]
        self._states: list[dict[str, Any]] | None = None
        self._groups: list[dict[str, Any]] = []

    def _counts(self) -> list[Any]:
        return [vars(scheduler).get("last_epoch") for scheduler in self._schedulers]

    def hold(self) -> None:
        """Remembers where all schedulers are, and what they set in the optimizer."""
        if self._schedulers:
            self._before = self._counts()
            self._states = [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
            self._groups = [
                {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in group.items()
                    if key != "params"
                }
                for group in self._optimizer.param_groups
            ]

    def restore(self) -> None:
        """Puts the schedulers, and what they set in the optimizer, back to where they were, if one of them moved."""
        states, self._states = self._states, None
        if states is None or self._counts() == self._before:
            return
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key, value in before.items():
                if isinstance(value, Tensor) and isinstance(group[key], Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
