"""The interface of every accountant, what it answers, and the table of names.

An accountant of one's own is one class and one registration:

    class Mine(Accountant): ...                      # two methods: bound_epsilon and bound_delta
    register_accountant("mine", Mine)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from privet._checks import check_at_least, check_probability
from privet.accounting.event import Event, Relation
from privet.accounting.gaussian import smallest_mu
from privet.accounting.terms import reduce_event
from privet.errors import ConfigurationError

__all__ = [
    "Accountant",
    "Bound",
    "get_accountant",
    "get_delta",
    "get_epsilon",
    "known_accountants",
    "register_accountant",
]


@dataclass(frozen=True)
class Bound:
    """An upper bound, a lower bound where the method has one (0 otherwise), the method, and what to know about it.

    `upper` includes the numerical error of the method; `notes` names every looser fallback that was taken.
    """

    upper: float
    lower: float
    method: str
    notes: tuple[str, ...] = ()


class Accountant(ABC):
    """Bounds ε and δ of an event under a neighbouring relation, for one record or a group of several.

    Guarantees: `epsilon` and `delta` are never below the truth; where nothing can be said they are infinity and 1.
    """

    name: str = ""

    @abstractmethod
    def bound_epsilon(self, event: Event, delta: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on the smallest ε at which `event` is (ε, δ)-private; the lower one only if asked for."""

    @abstractmethod
    def bound_delta(self, event: Event, epsilon: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on the smallest δ at which `event` is (ε, δ)-private; the lower one only if asked for."""

    @final
    def epsilon(
        self, event: Event, delta: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1
    ) -> float:
        """Returns an upper bound on ε at δ: 0 for an empty history, infinity where there is no bound."""
        delta = check_probability("delta", delta)
        return self.bound_epsilon(event, delta, relation=relation, group_size=group_size, lower=False).upper

    @final
    def delta(
        self, event: Event, epsilon: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1
    ) -> float:
        """Returns an upper bound on δ at ε."""
        epsilon = check_at_least("epsilon", epsilon)
        return self.bound_delta(event, epsilon, relation=relation, group_size=group_size, lower=False).upper

    def epsilon_near(
        self, event: Event, delta: float, limit: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE
    ) -> float:
        """Returns an upper bound on ε at δ, as sharp as this accountant can be where ε is near `limit`.

        A budget asks this before it refuses a step. By default it is `epsilon`; an accountant that keeps rough numbers
        between questions overrides it, so that a run calibrated to fit its budget also runs to its last step.
        """
        return self.epsilon(event, delta, relation=relation)

    @final
    def epsilon_bounds(
        self, event: Event, delta: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1
    ) -> Bound:
        """Returns both bounds on ε at δ, the method that gave the upper one, and its notes."""
        delta = check_probability("delta", delta)
        return self.bound_epsilon(event, delta, relation=relation, group_size=group_size, lower=True)

    @final
    def delta_bounds(
        self, event: Event, epsilon: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1
    ) -> Bound:
        """Returns both bounds on δ at ε, the method that gave the upper one, and its notes."""
        epsilon = check_at_least("epsilon", epsilon)
        return self.bound_delta(event, epsilon, relation=relation, group_size=group_size, lower=True)

    @final
    def curve(
        self,
        event: Event,
        deltas: Sequence[float],
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        group_size: int = 1,
    ) -> tuple[float, ...]:
        """Returns ε at each of `deltas`: the curve ε(δ)."""
        return tuple(self.epsilon(event, delta, relation=relation, group_size=group_size) for delta in deltas)

    @final
    def mu(
        self,
        event: Event,
        *,
        smallest_delta: float = 1e-10,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        group_size: int = 1,
    ) -> float:
        """Returns the smallest μ whose Gaussian covers the curve for every δ from `smallest_delta` to 1 - 1e-6.

        Gomez et al., arXiv 2503.10945: μ is the greatest of the μ that the points (ε, δ(ε)), ε >= 0, need. Below some
        δ every amplified mechanism behaves as if it were not sampled, hence the limit, which is part of the claim.
        """
        floor = check_probability("smallest_delta", smallest_delta)
        highest = self.epsilon(event, floor, relation=relation, group_size=group_size)
        if highest == math.inf:
            return math.inf
        # Without its sampling the event is one Gaussian, which lies above the whole curve. Where it holds an event that
        # only this accountant knows, that Gaussian is of the other events alone.
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        plain = math.inf if reduced.infinite else math.sqrt(reduced.unamplified)
        found = smallest_mu(lambda each: self.delta(event, each, relation=relation, group_size=group_size), highest)
        return min(found, plain)

    @final
    def true_positive_rate(
        self,
        event: Event,
        false_positive_rate: float,
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        group_size: int = 1,
    ) -> float:
        """Returns an upper bound on the true positive rate of any membership test at a false positive rate."""
        return self.true_positive_rates(event, [false_positive_rate], relation=relation, group_size=group_size)[0]

    @final
    def true_positive_rates(
        self,
        event: Event,
        false_positive_rates: Sequence[float],
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        group_size: int = 1,
    ) -> tuple[float, ...]:
        """Returns upper bounds on the true positive rates of any membership test at false positive rates.

        Every (ε, δ) on the curve bounds them by e^ε FPR + δ and by 1 - e^-ε (1 - δ - FPR): Kairouz, Oh and Viswanath,
        arXiv 1311.0776, theorem 2.1. Any choice of ε is valid; the best of many is reported. The curve is asked for
        once, for all rates.
        """
        rates = [check_probability("false_positive_rate", rate) for rate in false_positive_rates]
        smallest = max(min(rates, default=0.0) * 1e-3, 1e-12)
        highest = min(self.epsilon(event, smallest, relation=relation, group_size=group_size), 700.0)
        best = [1.0] * len(rates)
        for index in range(65):
            epsilon = highest * index / 64.0
            delta = self.delta(event, epsilon, relation=relation, group_size=group_size)
            for place, rate in enumerate(rates):
                implied = min(math.exp(epsilon) * rate + delta, 1.0 - math.exp(-epsilon) * (1.0 - delta - rate))
                best[place] = min(best[place], implied)
        return tuple(max(rate, power) for rate, power in zip(rates, best, strict=True))


_FACTORIES: dict[str, Callable[[], Accountant]] = {}


def register_accountant(name: str, factory: Callable[[], Accountant]) -> None:
    """Makes `get_accountant(name)` return what `factory()` makes. Registering a name again replaces it."""
    given: object = name
    if not isinstance(given, str) or not given or not callable(factory):
        raise ConfigurationError(f"An accountant is registered by a name and a factory, got {name!r}, {factory!r}.")
    _FACTORIES[name] = factory


def known_accountants() -> tuple[str, ...]:
    """Returns the names that `get_accountant` knows, in order."""
    return tuple(sorted(_FACTORIES))


def get_accountant(accountant: str | Accountant = "pld") -> Accountant:
    """Returns the accountant of that name, or the object itself if it is one already."""
    if isinstance(accountant, Accountant):
        return accountant
    given: object = accountant
    if not isinstance(given, str) or given not in _FACTORIES:
        known = ", ".join(repr(name) for name in known_accountants())
        hint = " 'pld' is the numerical one here, and at least as tight." if given == "prv" else ""
        raise ConfigurationError(f"accountant must be one of {known} or an Accountant, got {accountant!r}.{hint}")
    return _FACTORIES[accountant]()


def get_epsilon(
    event: Event,
    delta: float,
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
) -> float:
    """Returns an upper bound on ε of `event` at δ."""
    return get_accountant(accountant).epsilon(event, delta, relation=relation, group_size=group_size)


def get_delta(
    event: Event,
    epsilon: float,
    *,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ADD_OR_REMOVE_ONE,
    group_size: int = 1,
) -> float:
    """Returns an upper bound on δ of `event` at ε."""
    return get_accountant(accountant).delta(event, epsilon, relation=relation, group_size=group_size)
