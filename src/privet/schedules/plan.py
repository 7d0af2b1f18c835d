"""A mechanism with schedules: what every step of a run will release, and what it costs, before it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_count
from privet.accounting.event import Event, Relation
from privet.accounting.phases import Phase, append, spent
from privet.errors import ConfigurationError
from privet.mechanism import Mechanism
from privet.schedules.course import Course, factor_at

if TYPE_CHECKING:
    from privet.accounting.accountant import Accountant

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A mechanism of which parts change over training. Everything in it is public.

    Attributes:
        mechanism: what the first step would release without schedules, and how many steps are planned.
        noise: the course of the noise multiplier.
        clip_norm: the course of the clip norm, all of them where the policy has several. It costs nothing: noise is
            relative to the sensitivity.
        rate: the course of the sampling rate, and with it of the expected batch size; under Poisson sampling only.
        every: the logical steps (passes, where the sampling is billed by the pass) between two schedule steps.

    Example:
        >>> from privet import Exponential, Flat, Gaussian, Mechanism, Poisson
        >>> mechanism = Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=300)
        >>> [phase.count for phase in Plan(mechanism, noise=Exponential(0.9), every=100).phases()]
        [100, 100, 100]
    """

    mechanism: Mechanism
    noise: Course | None = None
    clip_norm: Course | None = None
    rate: Course | None = None
    every: int = 1

    def __post_init__(self) -> None:
        given: object = self.mechanism
        if not isinstance(given, Mechanism):
            raise ConfigurationError(f"mechanism of a Plan must be a privet.Mechanism, got {given!r}.")
        for name in ("noise", "clip_norm", "rate"):
            course: object = getattr(self, name)
            if course is not None and not callable(course):
                raise ConfigurationError(
                    f"{name} of a Plan must be a course such as Exponential(0.99), Stepwise(10, 0.5), "
                    f"Listed([1.0, 0.9]), or a function of the schedule step, got {course!r}."
                )
        check_count("every", self.every, 1)

    def at(self, t: int, *, current: Mechanism | None = None) -> Mechanism:
        """Returns the mechanism after t schedule steps: `current`, by default the plan's, with its scheduled parts set.

        Raises:
            ConfigurationError: if a scheduled number is not finite and above 0 then, or a rate above 1.
        """
        first = self.mechanism
        found = first if current is None else current
        if self.noise is not None:
            multiplier = first.noise.multiplier
            factor = factor_at(self.noise, t, start=multiplier, name="the noise multiplier")
            found = replace(found, noise=first.noise.with_multiplier(multiplier * factor))
        if self.clip_norm is not None:
            factor = factor_at(self.clip_norm, t, start=first.clipping.sensitivity, name="the clip norm")
            found = replace(found, clipping=first.clipping.scaled(factor))
        if self.rate is not None:
            factor = factor_at(self.rate, t, start=1.0, name="the sampling rate")
            found = replace(found, sampling=first.sampling.scaled(factor))
        return found

    def phases(self) -> tuple[Phase, ...]:
        """Returns the planned steps as the ledger will have them, run-length encoded."""
        found: list[Phase] = []
        done, t = 0, 0
        while done < self.mechanism.steps:
            count = min(self.every, self.mechanism.steps - done)
            append(found, Phase(self.at(t).event(1), count))
            done, t = done + count, t + 1
        return tuple(found)

    def event(self) -> Event:
        """Returns the event of all planned steps, composed of its phases."""
        return spent(self.phases())

    def epsilon(self, delta: float, *, accountant: str | Accountant = "pld") -> float:
        """Returns ε at `delta` of the planned steps, for zero-out neighbours.

        Under Poisson sampling add-or-remove-one costs the same. Under a partition it need not: a record that is added
        or removed may move others to other batches, and this ε does not cover that.
        """
        from privet.accounting import get_accountant

        return get_accountant(accountant).epsilon(self.event(), delta, relation=Relation.ZERO_OUT)

    def calibrated(self, *, epsilon: float, delta: float, accountant: str | Accountant = "pld") -> Plan:
        """Returns the same plan with the least noise that fits: all noise multipliers are scaled by one factor.

        Raises:
            ConfigurationError: if a scheduled number is out of range.
            AccountingError: if no noise reaches the target.
        """
        from privet.accounting import calibrate_noise_multiplier

        def scaled(multiplier: float) -> Plan:
            return replace(
                self, mechanism=replace(self.mechanism, noise=self.mechanism.noise.with_multiplier(multiplier))
            )

        certificate = calibrate_noise_multiplier(
            epsilon,
            delta,
            lambda multiplier: scaled(multiplier).event(),
            accountant=accountant,
            relation=Relation.ZERO_OUT,
        )
        return scaled(certificate.value)
