"""A private training run as a frozen description: sampling, clipping, noise and steps, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_count, check_positive
from privet.accounting.event import ClipCountEvent, Event, Relation
from privet.clipping import Adaptive, ClippingPolicy
from privet.errors import ConfigurationError
from privet.noise.description import Gaussian, Noise
from privet.sampling.base import Sampling

if TYPE_CHECKING:
    from privet.accounting.accountant import Accountant

__all__ = ["Gaussian", "Mechanism"]


@dataclass(frozen=True)
class Mechanism:
    """What a run releases. Everything in it is public.

    Attributes:
        sampling: how batches are formed.
        clipping: how much one example may weigh; it carries the sensitivity.
        noise: what is added, relative to the sensitivity.
        steps: how many logical steps are planned; passes over the data, where the sampling is billed by the pass.

    Example:
        >>> from privet import Flat, Gaussian, Mechanism, Poisson
        >>> mechanism = Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=1000)
        >>> 1.8 < mechanism.epsilon(delta=1e-5) < 1.9
        True
        >>> mechanism.calibrated(epsilon=1.0, delta=1e-5).noise.multiplier > 1.4
        True
    """

    sampling: Sampling
    clipping: ClippingPolicy
    noise: Noise
    steps: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("sampling", Sampling), ("clipping", ClippingPolicy), ("noise", Noise)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(
                    f"{name} of a Mechanism must be a description such as Poisson(0.01), Flat(1.0) or Gaussian(1.1), "
                    f"got {getattr(self, name)!r}."
                )
        check_positive(f"sensitivity of {type(self.clipping).__name__}", self.clipping.sensitivity)
        if isinstance(self.clipping, Adaptive):
            if not isinstance(self.noise, Gaussian):
                raise ConfigurationError(
                    f"clipping is Adaptive, whose count is released beside the gradient as one Gaussian, and the noise "
                    f"is {self.noise!r}. Expected Gaussian noise with it, or a fixed clip norm such as Flat's."
                )
            self.clipping.split(self.noise.multiplier)
        object.__setattr__(self, "steps", check_count("steps", self.steps))
        if self.noise.event.needs_separation:
            self.event(1)  # a sampling that does not keep the steps of an example apart refuses it

    def event(self, count: int | None = None) -> Event:
        """Returns the event of the planned steps (or passes), or of `count` of them."""
        return self.sampling.event_for(self.release, self.steps if count is None else count)

    @property
    def release(self) -> Event:
        """Returns the event of one step, before any amplification by sampling."""
        if isinstance(self.clipping, Adaptive):
            gradient, count = self.clipping.split(self.noise.multiplier)
            return ClipCountEvent(noise_multiplier=gradient, count_noise=count)
        return self.noise.event

    def drawn_under(self, sampling: Sampling | None) -> Mechanism:
        """Returns the mechanism with the sampling that a batch was drawn under, maybe before a schedule changed it."""
        if sampling is None or sampling == self.sampling:
            return self
        return replace(self, sampling=sampling)

    def epsilon(
        self, delta: float, *, accountant: str | Accountant = "pld", relation: Relation = Relation.ZERO_OUT
    ) -> float:
        """Returns ε at `delta` of the planned steps, by default for zero-out neighbors.

        Under Poisson sampling add-or-remove-one costs the same. Under a partition it need not: a record that is added
        or removed may move others to other batches, and this ε does not cover that.
        """
        from privet.accounting import get_accountant

        return get_accountant(accountant).epsilon(self.event(), delta, relation=relation)

    def calibrated(
        self,
        *,
        epsilon: float,
        delta: float,
        accountant: str | Accountant = "pld",
        relation: Relation = Relation.ZERO_OUT,
    ) -> Mechanism:
        """Returns the same mechanism with the least noise whose planned steps cost at most `epsilon` at `delta`.

        Raises:
            AccountingError: if no noise reaches the target.
        """
        from privet.accounting import calibrate_noise_multiplier

        certificate = calibrate_noise_multiplier(
            epsilon,
            delta,
            # Whatever is released beside the gradient is paid for by the noise multiplier too.
            lambda multiplier: self.sampling.event_for(self.noise.with_multiplier(multiplier).event, self.steps),
            accountant=accountant,
            relation=relation,
        )
        return replace(self, noise=self.noise.with_multiplier(certificate.value))
