"""Calibration: the one number that a target (ε, δ) leaves open, rounded toward privacy, with a certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from privet._checks import check_at_least, check_count, check_positive, check_target_delta
from privet.accounting.accountant import Accountant, get_accountant
from privet.accounting.event import Event, Relation
from privet.accounting.rdp import RdpAccountant
from privet.accounting.search import Bracket, Ladder, Look, enclosed, narrowed
from privet.errors import AccountingError, ConfigurationError

__all__ = [
    "Certificate",
    "calibrate_count_noise",
    "calibrate_noise_multiplier",
    "calibrate_rate",
    "calibrate_steps",
]

_NOISE_LIMITS = (1e-6, 1e15)
_RATE_LIMITS = (1e-15, 1.0)
_SCOUT_TOLERANCE = 0.1  # relative: how near the quick bound's answer must be to serve as a start


@dataclass(frozen=True)
class Certificate:
    """A calibrated number and its proof: ε of `value` is at most the target, and ε of `outside` is above it.

    Attributes:
        value: the number found.
        epsilon: ε there, at most `target_epsilon`.
        outside: the nearest number tried on the less private side. It does *not* fit. `None` if every number up to the
            limit of the search fits: then `value` is that limit, and not where the budget ends.
        epsilon_outside: ε of `outside`, above `target_epsilon`; `None` where `outside` is.
        target_epsilon: the ε asked for.
        delta: the δ asked for.
        accountant: the name of the accountant that vouches for both.
        relation: which data sets are neighbors.
        group_size: how many records are protected together.
    """

    value: float
    epsilon: float
    outside: float | None
    epsilon_outside: float | None
    target_epsilon: float
    delta: float
    accountant: str
    relation: Relation
    group_size: int = 1


@dataclass(frozen=True)
class _Target:
    """The curve of a calibration: ε of each value, beside the target."""

    epsilon: float
    delta: float
    event_of: Callable[[float], Event]
    accountant: str | Accountant
    relation: Relation
    group_size: int

    def __post_init__(self) -> None:
        check_at_least("target_epsilon", self.epsilon)
        check_target_delta("delta", self.delta, least=0.0)
        check_count("group_size", self.group_size, 1)
        given: object = self.event_of
        if not callable(given):
            raise ConfigurationError(f"The event must be given as a function of the number sought, got {given!r}.")
        get_accountant(self.accountant)  # an unknown name is refused before anything is computed

    def look(self, value: float) -> Look:
        """Returns ε at a value, and its height above the target.

        The height is that of log ε, which is nearly linear in the log of the value. Where ε or the target has no
        logarithm, it is the height of log δ at the target ε above the log of the target δ.
        """
        # A new accountant each time: what one keeps of earlier questions moves its last digits, and a certificate must
        # be what everyone gets who asks for this value alone.
        accountant = get_accountant(self.accountant)
        event = self.event_of(value)
        found = accountant.epsilon(event, self.delta, relation=self.relation, group_size=self.group_size)
        fits = found <= self.epsilon
        if self.epsilon > 0.0 and 0.0 < found < math.inf:
            return Look(value, found, fits, math.log(found / self.epsilon))
        leaked = accountant.delta(event, self.epsilon, relation=self.relation, group_size=self.group_size)
        height = math.log(leaked / self.delta) if leaked > 0.0 and self.delta > 0.0 else -math.inf
        if self.delta == 0.0:
            height = math.inf
        return Look(value, found, fits, min(height, -1e-9) if fits else max(height, 1e-9))

    def crossing(self, ladder: Ladder, start: float, tolerance: float) -> Bracket:
        """Returns the bracket of the number sought, narrowed down to `tolerance`, or the end where a limit was met."""
        start, slope = self._scouted(ladder, start)
        found = enclosed(self, ladder, start, slope=slope)
        if found.good is None or found.bad is None:
            return found
        return Bracket(*narrowed(self, ladder, found.good, found.bad, tolerance))

    def _scouted(self, ladder: Ladder, start: float) -> tuple[float, float]:
        """Returns where to start and how steep the curve is there, by Rényi's bound, which is quick and near."""
        scout = replace(self, accountant=RdpAccountant())
        found = enclosed(scout, ladder, start)
        if found.good is None or found.bad is None:
            return start if found.good is None else found.good.value, 1.0
        good, bad = narrowed(scout, ladder, found.good, found.bad, _SCOUT_TOLERANCE)
        if not (math.isfinite(good.height) and math.isfinite(bad.height)):
            return good.value, 1.0
        return good.value, (bad.height - good.height) / (ladder.place(good.value) - ladder.place(bad.value))

    def certificate(self, good: Look, bad: Look | None) -> Certificate:
        """Returns the certificate of a bracket."""
        return Certificate(
            value=good.value,
            epsilon=good.epsilon,
            outside=None if bad is None else bad.value,
            epsilon_outside=None if bad is None else bad.epsilon,
            target_epsilon=self.epsilon,
            delta=self.delta,
            accountant=get_accountant(self.accountant).name,
            relation=self.relation,
            group_size=self.group_size,
        )

    def unreachable(self, what: str, bad: Look | None, advice: str) -> AccountingError:
        """Returns the error of a target that nothing reaches."""
        at = "" if bad is None else f": at {bad.value:g} it is {bad.epsilon:g}"
        return AccountingError(f"No {what} reaches ε = {self.epsilon:g} at δ = {self.delta:g}{at}. {advice}")


def _digits(tolerance: float) -> int:
    """Returns how many decimal digits tell numbers apart that differ by `tolerance`, relative."""
    check_positive("tolerance", tolerance)
    return min(max(1 + math.ceil(-math.log10(tolerance) - 1e-9), 2), 15)


def _least_noise(target: _Target, tolerance: float) -> Certificate:
    ladder = Ladder(*_NOISE_LIMITS, private_above=True, digits=_digits(tolerance))
    found = target.crossing(ladder, 1.0, tolerance)
    if found.good is None:
        advice = "Something in the event does not depend on the noise, or δ is out of reach; allow more."
        raise target.unreachable("noise", found.bad, advice)
    if found.bad is None:
        return _without_noise(target, found.good)
    return target.certificate(found.good, found.bad)


def _without_noise(target: _Target, least: Look) -> Certificate:
    """Returns the certificate where all noise fits that was tried: that of no noise, if that fits as well."""
    try:
        none = target.look(0.0)
    except ConfigurationError:  # an event that needs noise
        return target.certificate(least, None)
    return target.certificate(none, None) if none.fits else target.certificate(least, none)


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    event_of_noise: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the least noise multiplier whose event fits (ε, δ), within `tolerance` (relative) and never below it.

    `event_of_noise(σ)` is the whole history, schedules included, and must get more private as σ grows. The value has
    as few decimal digits as the tolerance allows (six by default), so that it can be printed, and typed, as it is.

    Raises:
        AccountingError: if no noise reaches the target.
        ConfigurationError: if a number is out of its range.
    """
    target = _Target(target_epsilon, delta, event_of_noise, accountant, relation, group_size)
    return _least_noise(target, tolerance)


def calibrate_count_noise(
    target_epsilon: float,
    delta: float,
    event_of_count_noise: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the least noise on adaptive clipping's count whose event fits (ε, δ), gradient noise being given.

    Errors and digits are those of `calibrate_noise_multiplier`.
    """
    target = _Target(target_epsilon, delta, event_of_count_noise, accountant, relation, group_size)
    return _least_noise(target, tolerance)


def calibrate_rate(
    target_epsilon: float,
    delta: float,
    event_of_rate: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the greatest sampling rate in (0, 1] whose event fits (ε, δ), within `tolerance` and never above it.

    Raises:
        AccountingError: if no rate reaches the target.
        ConfigurationError: if a number is out of its range.
    """
    target = _Target(target_epsilon, delta, event_of_rate, accountant, relation, group_size)
    ladder = Ladder(*_RATE_LIMITS, private_above=False, digits=_digits(tolerance))
    found = target.crossing(ladder, 0.01, tolerance)
    if found.good is None:
        advice = "Something in the event does not depend on the rate; allow more, or add noise."
        raise target.unreachable("rate", found.bad, advice)
    return target.certificate(found.good, found.bad)


def calibrate_steps(
    target_epsilon: float,
    delta: float,
    event_of_steps: Callable[[int], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
    most: int = 10**9,
) -> Certificate:
    """Returns the greatest whole number of steps whose event fits (ε, δ); 0 if not even one does.

    No more than `most` are tried. If that many fit, `outside` is `None`, and the value is this limit.

    Raises:
        AccountingError: if not even 0 steps fit.
        ConfigurationError: if a number is out of its range.
    """
    check_count("most", most, 1)

    def event_of(steps: float) -> Event:
        return event_of_steps(round(steps))

    target = _Target(target_epsilon, delta, event_of, accountant, relation, group_size)
    found = target.crossing(Ladder(1.0, float(most), private_above=False), 1.0, 1.0 / most)
    if found.good is not None:
        return _whole(target.certificate(found.good, found.bad))
    none = target.look(0.0)
    if not none.fits:
        raise AccountingError(f"ε is {none.epsilon:g} before the first step, above the target {target.epsilon:g}.")
    return _whole(target.certificate(none, found.bad))


def _whole(found: Certificate) -> Certificate:
    return replace(found, value=round(found.value), outside=None if found.outside is None else round(found.outside))
