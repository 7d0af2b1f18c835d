"""Calibration: the one number that a target (ε, δ) leaves open, rounded toward privacy, with a certificate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from privet._checks import check_at_least, check_count, check_positive, check_probability
from privet.accounting.accountant import Accountant, get_accountant
from privet.accounting.event import Event, Relation
from privet.errors import AccountingError, ConfigurationError

__all__ = [
    "Certificate",
    "calibrate_count_noise",
    "calibrate_noise_multiplier",
    "calibrate_rate",
    "calibrate_steps",
]


@dataclass(frozen=True)
class Certificate:
    """A calibrated number with its proof: ε there is within the target, and ε `just_inside` is not.

    `inside` is the nearest number tried on the less private side; infinity or 0 with ε of it unknown (nan is never
    reported: `None`) if every number on that side fits as well.
    """

    value: float
    epsilon: float
    inside: float | None
    epsilon_inside: float | None
    target_epsilon: float
    delta: float
    accountant: str
    relation: Relation


@dataclass(frozen=True)
class _Target:
    epsilon: float
    delta: float
    accountant: Accountant
    relation: Relation
    event_of: Callable[[float], Event]

    def at(self, value: float) -> float:
        return self.accountant.epsilon(self.event_of(value), self.delta, relation=self.relation)

    def certificate(self, good: tuple[float, float], bad: tuple[float, float] | None) -> Certificate:
        return Certificate(
            value=good[0],
            epsilon=good[1],
            inside=None if bad is None else bad[0],
            epsilon_inside=None if bad is None else bad[1],
            target_epsilon=self.epsilon,
            delta=self.delta,
            accountant=self.accountant.name,
            relation=self.relation,
        )


def _target(
    epsilon: float,
    delta: float,
    event_of: Callable[[float], Event],
    accountant: str | Accountant,
    relation: Relation,
) -> _Target:
    check_at_least("target_epsilon", epsilon)
    check_probability("delta", delta)
    if not callable(event_of):
        raise ConfigurationError(f"The event must be given as a function of the number sought, got {event_of!r}.")
    return _Target(epsilon, delta, get_accountant(accountant), relation, event_of)


def _closed(
    target: _Target, good: tuple[float, float], bad: tuple[float, float], tolerance: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the bracket narrowed until its ends differ by at most `tolerance`, relative. Values are positive.

    Log ε is close to linear in log of the number sought, so secants (Illinois' rule) need few looks at the curve.
    """
    goal = math.log(target.epsilon) if target.epsilon > 0.0 else -math.inf

    def height(point: tuple[float, float]) -> float:
        return (math.log(point[1]) if point[1] > 0.0 else -math.inf) - goal

    above, below = height(bad), height(good)
    for attempt in range(200):
        low, high = math.log(bad[0]), math.log(good[0])
        if abs(high - low) <= tolerance:
            break
        if attempt % 4 == 3 or not (math.isfinite(above) and math.isfinite(below)) or above - below <= 0.0:
            middle = (low + high) / 2.0
        else:
            middle = low + (high - low) * above / (above - below)
            # Aim at the private side by a little, so that the answer's side gets closed in as well.
            middle += math.copysign(min(tolerance, abs(high - low)) / 3.0, high - low)
        edge = abs(high - low) * 1e-6
        middle = min(max(middle, min(low, high) + edge), max(low, high) - edge)
        value = math.exp(middle)
        found = target.at(value)
        if found <= target.epsilon:
            good = (value, found)
            below, above = height(good), above / 2.0 if attempt % 4 != 3 else height(bad)
        else:
            bad = (value, found)
            above, below = height(bad), below / 2.0 if attempt % 4 != 3 else height(good)
    return good, bad


def _first_guess(target: _Target, start: float) -> float:
    """Returns a number near the answer by the quick Rényi bound, or `start` where that finds none."""
    if target.accountant.name == "rdp":
        return start
    quick = _Target(target.epsilon, target.delta, get_accountant("rdp"), target.relation, target.event_of)
    try:
        good, bad = _bracket(quick, start)
        return start if bad is None else _closed(quick, good, bad, 0.02)[0][0]
    except AccountingError:
        return start


def _bracket(target: _Target, start: float) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Returns a noise that fits and a smaller one that does not, or None where every noise fits."""
    value, factor = start, 1.12 if start != 1.0 else 2.0
    point = (value, target.at(value))
    good = bad = None
    for _ in range(80):
        if point[1] <= target.epsilon:
            good = point
            if bad is not None:
                return good, bad
            value = point[0] / factor
        else:
            bad = point
            if good is not None:
                return good, bad
            value = point[0] * factor
        if value < 1e-12:
            return point, None
        if value > 1e15:
            break
        point, factor = (value, target.at(value)), min(factor**2, 1e6)
    raise AccountingError(
        f"No noise reaches ε = {target.epsilon:g} at δ = {target.delta:g}: at {point[0]:g} it is {point[1]:g}. "
        "Something in the event does not depend on the noise, or δ is out of reach; allow more."
    )


def _least_noise(target: _Target, tolerance: float) -> Certificate:
    check_positive("tolerance", tolerance)
    good, bad = _bracket(target, _first_guess(target, 1.0))
    if bad is not None:
        good, bad = _closed(target, good, bad, tolerance)
    return target.certificate(good, bad)


def calibrate_noise_multiplier(
    target_epsilon: float,
    delta: float,
    event_of_noise: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the least noise multiplier whose event fits (ε, δ), within `tolerance` (relative) and never below it.

    `event_of_noise(σ)` is the whole history, schedules included, and must get more private as σ grows.
    """
    return _least_noise(_target(target_epsilon, delta, event_of_noise, accountant, relation), tolerance)


def calibrate_count_noise(
    target_epsilon: float,
    delta: float,
    event_of_count_noise: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the least noise on adaptive clipping's count whose event fits (ε, δ), gradient noise being given."""
    return _least_noise(_target(target_epsilon, delta, event_of_count_noise, accountant, relation), tolerance)


def calibrate_rate(
    target_epsilon: float,
    delta: float,
    event_of_rate: Callable[[float], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    tolerance: float = 1e-5,
) -> Certificate:
    """Returns the greatest sampling rate in (0, 1] whose event fits (ε, δ)."""
    check_positive("tolerance", tolerance)
    target = _target(target_epsilon, delta, event_of_rate, accountant, relation)
    bad = (1.0, target.at(1.0))
    if bad[1] <= target.epsilon:
        return target.certificate(bad, None)
    value, factor = 0.5, 2.0
    while value >= 1e-15:
        point = (value, target.at(value))
        if point[1] <= target.epsilon:
            good, bad = _closed(target, point, bad, tolerance)
            return target.certificate(good, bad)
        bad, value, factor = point, value / factor, min(factor**2, 1e3)
    raise AccountingError(
        f"No rate reaches ε = {target.epsilon:g} at δ = {target.delta:g}: at {bad[0]:g} it is {bad[1]:g}. "
        "Something in the event does not depend on the rate; allow more, or add noise."
    )


def calibrate_steps(
    target_epsilon: float,
    delta: float,
    event_of_steps: Callable[[int], Event],
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    most: int = 10**9,
) -> Certificate:
    """Returns the greatest whole number of steps, up to `most`, whose event fits (ε, δ); 0 if not even one does."""
    check_count("most", most, 1)
    target = _target(target_epsilon, delta, lambda steps: event_of_steps(round(steps)), accountant, relation)
    good, bad, steps = (0, target.at(0)), None, 1
    if good[1] > target.epsilon:
        raise AccountingError(f"ε is {good[1]:g} before the first step, above the target {target.epsilon:g}.")
    while bad is None:
        point = (steps, target.at(steps))
        if point[1] > target.epsilon:
            bad = point
        elif steps == most:
            return target.certificate(point, None)
        else:
            good, steps = point, min(most, steps * 4)
    attempt = 0
    while bad[0] - good[0] > 1:
        attempt += 1
        # ε grows about like a power of the steps: a secant of the logs, and every third time the middle.
        middle = (good[0] + bad[0]) // 2
        if attempt % 3 and good[0] > 0 and good[1] > 0.0 and math.isfinite(bad[1]):
            share = math.log(target.epsilon / good[1]) / math.log(bad[1] / good[1])
            middle = round(good[0] * (bad[0] / good[0]) ** share)
        middle = min(max(middle, good[0] + 1), bad[0] - 1)
        point = (middle, target.at(middle))
        if point[1] <= target.epsilon:
            good = point
        else:
            bad = point
    return target.certificate(good, bad)
