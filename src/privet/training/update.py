"""One logical step, from the secret sum to the optimizer: the part that both doors share.

Order matters, and is kept in one place: the ledger first, then noise, then `p.grad`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.accounting.role import LedgerLike
from privet.errors import BudgetExceededError, ConfigurationError, ProtocolError, RanksError
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.rows import of_type
from privet.gradients.weights import groups_of
from privet.mechanism import Mechanism
from privet.noise import NoiseMechanism
from privet.parallel.role import Alone, Due, Ranks
from privet.sampling.base import BatchTicket, Sampling, refuse_change
from privet.training.accumulated_sum import AccumulatedSum
from privet.training.billing import Billing
from privet.training.clip_count import adapted, counted, resumed
from privet.training.continuity import Continuity, refuse_other_noise
from privet.training.divisor import Divisor
from privet.training.guard import Guard
from privet.training.loaders import Loaders
from privet.training.logical_sum import LogicalSum, thrown_away
from privet.training.optimizers import StepHooks
from privet.training.riding_ledger import RidingLedger
from privet.training.roles import LateSum, Scheduled, refuse_other_schedules

__all__ = ["PrivateUpdate", "update_of"]


class PrivateUpdate:
    """Holds a clipped sum until the optimizer steps. Then bills the step, adds noise, and hands over `p.grad`.

    What is due is decided by its `Billing`, and which sum is whole by its `LogicalSum`.

    Args:
        parameters: the private parameters by name.
        mechanism: what is released at each step. It may be replaced between logical steps, never inside of one.
        noise: turns clipped sums into private gradients.
        ledger: where every step is written before its noise is drawn.
        divisor: a public constant: the expected batch size for a mean loss, 1 for a sum. None if it is not known yet;
            then no step may be taken.
        follows_rate: whether the divisor is an expected batch size, and so changes with the sampling rate.
        batch_size: the expected batch size, where the divisor is not.
        ranks: those that train together; by default this process alone.
        parts: how many backwards make a step, each on one part of a logical batch.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        mechanism: Mechanism,
        noise: NoiseMechanism,
        ledger: LedgerLike,
        divisor: float | None,
        follows_rate: bool = True,
        batch_size: float | None = None,
        ranks: Ranks | None = None,
        parts: int = 1,
    ) -> None:
        self.parameters = dict(parameters)
        self.ranks: Ranks = Alone() if ranks is None else ranks
        self._continuity = Continuity(noise)
        self.noise = self.ranks.noise(noise)
        self.divisor = Divisor(divisor, sampling=mechanism.sampling if follows_rate else None)
        self._expected = self.divisor if follows_rate else Divisor(batch_size, sampling=mechanism.sampling)
        self.steps, self.detached = 0, False
        self.schedules: list[Scheduled] = []
        self.billing = Billing(ledger)
        self.guard = Guard(self.parameters, ledger)
        self._mechanism = self.settled = mechanism
        self.parts = parts
        self._sum = LogicalSum() if parts == 1 else AccumulatedSum(parts)
        self.loaders = Loaders(self.announce)
        self.known: BatchTicket | None = None  # the batch whose tensors the model was given
        self._on_forget: list[Callable[[], None]] = []
        self._late: LateSum | None = None
        self.watcher: Callable[[ClippedSum, Mechanism, int], None] | None = None  # of statistics, without noise
        self._riding = RidingLedger(self)
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self.hooks = StepHooks(self.parameters, ready=self._ready, release=self.release)

    def attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Makes every step of the optimizer a release of this update, and its saved state hold the ledger."""
        self._optimizer = weakref.ref(optimizer)  # a strong one would keep it alive in the table of updates
        self.hooks.attach(optimizer)
        self.guard.attach(optimizer)
        self._riding.attach(module, optimizer)
        _UPDATES[optimizer] = self

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Returns the optimizer whose steps release, or None if it is gone."""
        return self._optimizer()

    def admit(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes these parameters for the private ones from now on: those of before, and new ones among them."""
        self.parameters.clear()
        self.parameters.update(parameters)  # the same dict, which others look into
        self.guard.admit(parameters)

    def refuse_detached(self, what: str) -> None:
        """Raises if training is not private any more."""
        if self.detached:
            raise ProtocolError(
                f"{what}, and this training is not private any more: detach() has ended it. Make it private anew."
            )

    def refuse_mid_step(self, what: str) -> None:
        """Raises if a logical step is under way, during which `what` may not happen, or training is not private now."""
        self.refuse_detached(what)
        if self.pending or self._sum.begun or self._sum.unfinished:
            raise ProtocolError(
                f"{what} inside a logical step, of which a part is clipped already. Expected it between logical steps: "
                "after optimizer.step(), with physical batches after that of the last one of its logical batch."
            )

    def detach(self) -> None:
        """Ends private training: module and optimizer are left as if it had never begun.

        Raises:
            ProtocolError: inside a logical step, or on several ranks. Nothing is changed then.
        """
        self.refuse_mid_step("detach() was called")
        if self.ranks.share.ranks > 1:
            raise ProtocolError(
                f"detach() was called on {self.ranks.found}, whose wrapper was put to rest. Expected one process. "
                "Build a new module on each rank, and load_state_dict() what this one learned."
            )
        self.settle()
        self.loaders.end()
        self.forget()
        self.guard.detach()
        self._riding.detach()
        optimizer = self.optimizer
        if optimizer is not None:
            self.hooks.detach(optimizer)
            del _UPDATES[optimizer]
        self.detached = True

    @property
    def ledger(self) -> LedgerLike:
        """Returns the ledger."""
        return self.billing.ledger

    # -- what is released --------------------------------------------------------------------------------------------

    @property
    def mechanism(self) -> Mechanism:
        """Returns what the next step releases. Setting it opens a new phase; `settled` is the same without schedules.

        Raises:
            ProtocolError: if a logical step is under way.
        """
        return self._mechanism

    @mechanism.setter
    def mechanism(self, mechanism: Mechanism) -> None:
        self.reschedule(mechanism)
        self.settled = mechanism

    def reschedule(self, mechanism: Mechanism) -> None:
        """Replaces the mechanism, on behalf of a schedule.

        Raises:
            ProtocolError: if a logical step is under way: a part of it was clipped as the mechanism says now.
        """
        if self.detached or self.pending or self._sum.begun or self._sum.unfinished:
            self.refuse_mid_step("the mechanism was to change")
        groups_of(mechanism.clipping, list(self.parameters))
        refuse_other_noise(self._mechanism.noise, mechanism.noise)
        if mechanism.sampling != self._mechanism.sampling:
            refuse_change(self._mechanism.sampling, mechanism.sampling)
            self.loaders.resample(mechanism.sampling)
        self._mechanism = mechanism

    # -- where the batch came from -----------------------------------------------------------------------------------

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that the private loader is about to hand over."""
        self._sum.announce(ticket)
        self.billing.announce(ticket)

    def recognize(self, tensors: Iterable[Tensor], *, anew: bool) -> None:
        """Takes note of what the model was given, by which the batch of the next backward may be known.

        Args:
            tensors: all that it was given.
            anew: whether this is the first forward of that backward.

        Raises:
            ProtocolError: if forwards that share the backward are of two batches of the loader, or a parameter changed
                while gradients without privacy were shown.
        """
        if anew:
            self.guard.hides()  # the forward has dropped what was in p.grad
        found = self.billing.handed_over.recognized(tensors)
        known, self.known = self.known, found if anew or self.known is None else self.known
        if not anew and None not in (known, found) and found is not known:
            raise ProtocolError(
                "two forwards that share a backward were given two batches of the private loader, and an example may "
                "be in both: it would count twice. Expected the same examples. Take a step on each batch."
            )

    # -- the sum that waits for its step -----------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Returns whether a sum waits for its step."""
        return self._sum.pending or (self._late is not None and self._late.pending)

    @property
    def unfinished(self) -> bool:
        """Returns whether physical batches of the logical batch at hand are still to come."""
        return self._sum.unfinished

    def receive(self, clipped: ClippedSum, *, examples: int) -> None:
        """Takes the sum of one backward.

        Raises:
            ProtocolError: if the sum of another backward still waits, or its rows are not the examples of a batch that
                was handed over.
        """
        self._sum.refuse_second()
        known, self.known = self.known, None
        if isinstance(self._sum, AccumulatedSum):
            self._sum.receive(clipped, examples=examples, known=known)
        else:
            match = None if self._sum.physical else self.billing.handed_over.match(examples, known)
            self._sum.receive(clipped, examples=examples, match=match)
        self.hooks.renew()

    def accumulate(self) -> None:
        """Takes the step of a physical batch that is not the last of its logical batch: nothing is released.

        Raises:
            ProtocolError: if there was no backward on it.
        """
        self._bring()
        self._sum.accumulate()

    def discard(self) -> None:
        """Forgets the sum that waits; nothing of it was released."""
        self._sum.discard()

    def retract(self) -> bool:
        """Forgets the physical batch at hand. Returns whether it has left nothing, and may come again in parts."""
        for listener in self._on_forget:
            listener()
        return self._sum.retract()

    def forget(self) -> None:
        """Gives up the logical batch at hand; nothing of it was released, and nothing of it is kept."""
        for listener in self._on_forget:
            listener()
        self._sum.forget()

    def on_forget(self, listener: Callable[[], None]) -> None:
        """Calls `listener()` whenever a batch is given up, so that nothing of its forward is kept either."""
        self._on_forget.append(listener)

    def on_demand(self, late: LateSum) -> None:
        """Takes sums from `late` at each step, in place of those of `receive` after each backward."""
        self._late = late

    def _bring(self) -> None:
        if self._late is not None:
            self._late.bring()

    def _ready(self) -> bool:
        """Forms the sum that waits, where it is formed late. Returns whether one waits."""
        self._bring()
        return self._sum.pending

    # -- the release -------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Bills the step, adds noise, and sets `p.grad` of every private parameter that is trainable now.

        Raises:
            ProtocolError: if there is no sum to release, or physical batches of its logical batch are still to come.
            ConfigurationError: if the expected batch size is not known.
            RanksError: if another rank failed, or is about to take another step.
            BudgetExceededError: if the step would exceed the budget.
            After the last two nothing was released, and the sum is forgotten, so that everything is as it was before
            the batch.
        """
        # The ledger comes first. If anything fails after it, the step is paid for and not taken; the other way round a
        # gradient could reach the optimizer that nothing paid for.
        try:
            ticket, parts_of = self.ranks.agreed(self._due), self._sum.parts_of
            match = None if ticket is None else self._sum.match()
            self._riding.say_what_is_unknown()
            self.ranks.written(lambda: self.billing.begin(self._mechanism, match, parts_of=parts_of), self.ledger)
        except (BudgetExceededError, RanksError):
            self.discard()
            raise
        divisor = self._divisor(ticket)
        clipped = self._sum.take()
        if self._late is not None:
            self._late.summed(clipped)
        # The number is used up before any noise is drawn: whatever fails, no other sum meets the noise of this step.
        step, self.steps = self.steps, self.steps + 1
        released, now = counted(clipped, self._mechanism), self._mechanism
        self._continuity.step(ticket, self._drawn(ticket))
        gradient = self.noise.release(released, multiplier=now.noise.multiplier, step=step)
        values, deviation = gradient.values, self._continuity.deviation(gradient, divisor)
        self._mechanism = adapted(values, now, expected=lambda: self._expected.under(self._drawn(ticket)))
        for name, value in values.items():
            parameter = self.parameters[name]
            # A parameter that was frozen since its backward must not move. Its part of the noise was drawn anyway.
            if parameter.requires_grad:
                divided = of_type(value if divisor == 1 else value.div_(divisor), parameter.dtype)
                self.guard.release(parameter, self.ranks.gradient(parameter, divided), deviation=deviation)
        if self.watcher is not None:
            self.watcher(released, now, step)

    def _due(self) -> Due:
        """Returns what this process is about to release, or raises if it cannot."""
        self._bring()
        self._sum.require()
        match = self._sum.match()
        self._continuity.require(match, otherwise=self.discard)
        if match is not None and len(match.possible) > 1 and self.ranks.share.ranks > 1:
            raise ProtocolError(
                "batches are read ahead, in tensors of their own, so that it cannot be told which of several batches "
                "of one size this is. On several ranks it has to be the same one: an example could be in two shares. "
                "Expected the loader's own tensors, or no reading ahead. Move batches to the device in the loop."
            )
        ticket = None if match is None else match.ticket
        self._divisor(ticket)
        return Due(ticket, step=self.steps, words=lambda: f"{self._mechanism} of {self._sum.names}")

    def _divisor(self, ticket: BatchTicket | None) -> float:
        """Returns what the noisy sum of a batch is divided by."""
        return self.divisor.under(self._drawn(ticket))

    def _drawn(self, ticket: BatchTicket | None) -> Sampling:
        return self._mechanism.drawn_under(None if ticket is None else ticket.sampling).sampling

    def refuse_zero_grad(self) -> None:
        """Raises if a gradient would be thrown away between backward and step."""
        self._sum.refuse_zero_grad()
        if self._late is not None and self._late.pending:
            raise thrown_away()

    def settle(self) -> None:
        """Puts on the ledger what happened without privacy, if anything did. Call it before the ledger is read."""
        self.guard.settle()

    # -- to and from a checkpoint ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""
        schedules = [schedule.state_dict() for schedule in self.schedules]
        state = {"steps": self.steps, "noise": self.noise.state_dict(), "schedules": schedules}
        return {**state, "clip_norm": self._mechanism.clipping.sensitivity}

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raises if the state was saved under other schedules."""
        refuse_other_schedules(self.schedules, state.get("schedules", []))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes; steps already taken here are never numbered again."""
        self.refuse_state(state)
        self.forget()
        self.noise.load_state_dict(state["noise"])
        self.steps = max(self.steps, int(state["steps"]))
        self.billing.resumed()
        self._continuity.resumed()
        self._mechanism = resumed(self._mechanism, state)
        for schedule, its_state in zip(self.schedules, state.get("schedules", []), strict=True):
            schedule.load_state_dict(its_state)


_UPDATES: weakref.WeakKeyDictionary[torch.optim.Optimizer, PrivateUpdate] = weakref.WeakKeyDictionary()


def update_of(optimizer: object) -> PrivateUpdate:
    """Returns the update that an optimizer's steps release.

    Raises:
        ConfigurationError: if the optimizer was not made private.
    """
    found = _UPDATES.get(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None
    if found is None:
        raise ConfigurationError(
            f"this {type(optimizer).__name__} is not the optimizer of a private module. Expected the one that "
            "make_private returned, or that PrivateStep was given."
        )
    return found
