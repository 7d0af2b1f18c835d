"""Whether correlated noise goes on at a step: only from one batch of a loader to the next, in the order that is billed.

An example's steps are as far apart as the sampling says only while batches come in that order.

    the step is on                                              the noise
    the next batch of the same pass                             goes on
    batch 0 of the next pass, after the last of this one        goes on, where the order of all passes is the same
    any other whole batch of a private loader                   begins anew, with a warning; the bill covers it
    a batch of the user's own, a part of one, one in doubt      the step is refused before anything is billed
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from privet.errors import ConfigurationError, ProtocolError
from privet.noise.correlated import Remembering
from privet.noise.description import Noise
from privet.noise.gaussian import NoiseMechanism, PrivateGradient
from privet.sampling.base import BatchTicket, Sampling
from privet.training.handed_over import Match

__all__ = ["Continuity", "refuse_other_noise"]


class Continuity:
    """Follows the batches of a run on behalf of its noise, and does nothing where that has no memory.

    Args:
        noise: the mechanism of this process.
    """

    def __init__(self, noise: NoiseMechanism) -> None:
        self._noise = noise if isinstance(noise, Remembering) else None
        self._last: BatchTicket | None = None
        self._warned = False

    def deviation(self, gradient: PrivateGradient, divisor: float) -> float | None:
        """Returns the standard deviation of the noise in a gradient over a divisor, or None if it depends on before."""
        return gradient.std / divisor if self._noise is None else None

    def require(self, match: Match | None, *, otherwise: Callable[[], None]) -> None:
        """Raises unless it is certain which batch of the loader a step is on, where the noise is correlated.

        Args:
            match: the batch.
            otherwise: called before the error, to give up the sum that waits.

        Raises:
            ProtocolError: if it is not certain. Nothing is billed or released then.
        """
        if self._noise is None or (match is not None and len(match.possible) == 1):
            return
        otherwise()
        raise ProtocolError(
            "the noise is correlated over steps, and it is not certain which whole batch of the private loader this "
            "step is on: an example may be in it that took part a few steps ago, which no bound covers. Expected one "
            "step on each batch, with the loader's own tensors. Take batches from the private loader one by one, "
            "without reading ahead, or use independent noise: Gaussian. Nothing was released."
        )

    def step(self, ticket: BatchTicket | None, sampling: Sampling) -> None:
        """Begins the correlation anew where a step's batch does not follow that of the step before.

        Call it when the step has its number, and right before the noise: if anything fails in between, the mechanism
        meets a gap in the numbers, and begins anew as well.

        Args:
            ticket: of the step's batch.
            sampling: the law of it.
        """
        before, self._last = self._last, ticket
        if self._noise is None or before is None or (ticket is not None and _follows(before, ticket, sampling)):
            return
        self._noise.begin_anew()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a batch did not follow the one of the step before, such as after a pass that was left early. The "
                "correlation of the noise begins anew there, so that epsilon covers it, and later sums are noisier. "
                "Expected every batch of every pass, in order.",
                stacklevel=2,
            )

    def resumed(self) -> None:
        """Forgets the last batch: after a resume the noise knows itself whether it may go on."""
        self._last = None


def refuse_other_noise(now: Noise, then: Noise) -> None:
    """Raises ConfigurationError unless a noise may take the place of another: only the multiplier may differ."""
    if then != now.with_multiplier(then.multiplier):
        raise ConfigurationError(
            f"{now} cannot become {then} in mid-run: the noise that is drawn would not be the one that is billed. "
            "Expected a change of its multiplier alone."
        )


def _follows(before: BatchTicket, ticket: BatchTicket, sampling: Sampling) -> bool:
    """Returns whether a batch comes right after another one in the order that is billed."""
    if before.source != ticket.source:
        return False
    if before.passes == ticket.passes:
        return ticket.index == before.index + 1
    # Steps that are billed one by one have no order that holds from pass to pass.
    next_pass = before.ends_pass and ticket.passes == before.passes + 1 and ticket.index == 0
    return next_pass and sampling.billed_per == "pass"
