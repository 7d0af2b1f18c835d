"""A mechanism with schedules: what every step of a run will release, and what it costs, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_count
from privet.accounting.event import Event, Relation
from privet.accounting.phases import Phase, append, spent
from privet.clipping import ClippingPolicy
from privet.errors import ConfigurationError
from privet.mechanism import Gaussian, Mechanism
from privet.sampling import Poisson
from privet.schedules.course import Course, value_at

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
            if course is not None and not isinstance(course, Course):
                raise ConfigurationError(
                    f"{name} of a Plan must be a course such as Exponential(0.99), Stepwise(10, 0.5), Lambda(f) or "
                    f"Listed([1.0, 0.9]), got {course!r}."
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
            name = "the noise multiplier"
            found = replace(found, noise=Gaussian(value_at(self.noise, t, start=first.noise.multiplier, name=name)))
        if self.clip_norm is not None:
            found = replace(found, clipping=_clipping_at(first.clipping, self.clip_norm, t))
        if self.rate is not None:
            if not isinstance(first.sampling, Poisson):
                raise ConfigurationError(
                    f"{first.sampling} has no rate to schedule. Expected Poisson sampling. Leave the rate of a "
                    "partition alone."
                )
            rate = value_at(self.rate, t, start=first.sampling.rate, name="the sampling rate")
            found = replace(found, sampling=Poisson(rate))
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
            return replace(self, mechanism=replace(self.mechanism, noise=Gaussian(multiplier)))

        certificate = calibrate_noise_multiplier(
            epsilon,
            delta,
            lambda multiplier: scaled(multiplier).event(),
            accountant=accountant,
            relation=Relation.ZERO_OUT,
        )
        return scaled(certificate.value)


def _clipping_at(policy: ClippingPolicy, course: Course, t: int) -> ClippingPolicy:
    """Returns the policy with its clip norm, or each of them, at schedule step t."""
    fields = getattr(policy, "__dataclass_fields__", {})
    field = next((each for each in ("clip_norm", "clip_norms") if each in fields), None)
    norm: object = None if field is None else getattr(policy, field)
    if field is not None and isinstance(norm, Mapping):
        bounds = {key: value_at(course, t, start=c, name=f"the clip norm of {key!r}") for key, c in norm.items()}
        return replace(policy, **{field: bounds})  # type: ignore[type-var]
    if field is not None and isinstance(norm, int | float):
        scheduled = value_at(course, t, start=float(norm), name="the clip norm")
        return replace(policy, **{field: scheduled})  # type: ignore[type-var]
    raise ConfigurationError(
        f"{type(policy).__name__} has no clip norm that a schedule could change. Expected a frozen dataclass with a "
        "field clip_norm, such as Flat or PerLayer."
    )
