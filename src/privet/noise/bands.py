"""How many bands are best at a target (ε, δ): bands against amplification by sampling.

With b bands the data is cut into b parts, and step t draws from part t mod b: each record of it by a coin of its own,
at b times the rate that all records would have (Choquette-Choo et al., arXiv 2306.08153). So more bands correlate
better, and are amplified less. One band is ordinary DP-SGD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from privet._checks import check_count, check_positive, check_probability
from privet.accounting.accountant import Accountant
from privet.accounting.calibration import calibrate_noise_multiplier
from privet.accounting.correlated import in_one_participation
from privet.accounting.event import Event, PoissonEvent, Relation, repeated
from privet.errors import ConfigurationError
from privet.noise.correlated import BandMF
from privet.noise.optimized import optimized_bands
from privet.noise.workload import Workload

__all__ = ["BandChoice", "best_bands"]


@dataclass(frozen=True)
class BandChoice:
    """Noise for a target under cyclic Poisson sampling in as many parts as it has bands.

    Attributes:
        noise: with the least multiplier that fits the target.
        epsilon: what the run costs.
        error: the root mean square error of one element of the sums of gradients, in clip norms. The less, the better.
    """

    noise: BandMF
    epsilon: float
    error: float

    @property
    def bands(self) -> int:
        """Returns the number of bands, and of parts."""
        return len(self.noise.coefficients)


def best_bands(
    *,
    epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    bands: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    workload: Workload | None = None,
    accountant: str | Accountant = "pld",
    relation: Relation = Relation.ZERO_OUT,
) -> tuple[BandChoice, ...]:
    """Returns a calibrated noise for each number of bands, the one with the least error first.

    Args:
        epsilon: the target.
        delta: the target.
        rate: the expected batch size over the number of records.
        steps: of the run.
        bands: the numbers to try. Those that would draw a record with a probability above 1 are left out.
        workload: what the optimizer does; by default plain gradient descent at a constant rate.
        accountant: computes ε.
        relation: which data sets are neighbors.

    Raises:
        ConfigurationError: if no number of bands is left.
        AccountingError: if no noise reaches the target.

    Example:
        >>> best, *others = best_bands(epsilon=8.0, delta=1e-5, rate=0.05, steps=64, bands=(1, 4))
        >>> best.bands, best.error < others[0].error
        (4, True)
    """
    check_positive("rate", check_probability("rate", rate))
    check_count("steps", steps, 1)
    tried = [each for each in dict.fromkeys(bands) if check_count("bands", each, 1) * rate <= 1.0 and each <= steps]
    if not tried:
        raise ConfigurationError(
            f"no number of bands among {tuple(bands)} fits a rate of {rate:g} and {steps} steps. Expected b with b x "
            "rate at most 1, and at most as many bands as steps."
        )
    found = []
    for each in tried:
        best = optimized_bands(each, steps=steps, workload=workload)

        def event_of(multiplier: float, noise: BandMF = best.noise) -> Event:
            parts = len(noise.coefficients)
            participation = in_one_participation(noise.with_multiplier(multiplier).event, parts)
            return repeated(PoissonEvent(min(1.0, rate * parts), participation), -(-steps // parts))

        sized = calibrate_noise_multiplier(epsilon, delta, event_of, accountant=accountant, relation=relation)
        found.append(BandChoice(best.noise.with_multiplier(sized.value), sized.epsilon, sized.value * best.loss))
    return tuple(sorted(found, key=lambda choice: choice.error))
