"""The noise that a target ε asks for, over whole passes of a private loader."""

from __future__ import annotations

from privet._checks import check_count, check_positive
from privet.accounting.role import LedgerLike
from privet.clipping import ClippingPolicy
from privet.errors import ConfigurationError
from privet.mechanism import Mechanism
from privet.noise import Noise
from privet.sampling import PrivateLoader
from privet.training.options import noise_of

__all__ = ["multiplier_for"]


def multiplier_for(
    ledger: LedgerLike,
    loader: PrivateLoader,
    policy: ClippingPolicy,
    noise: Noise | None,
    *,
    epochs: int,
    epsilon: float,
    delta: float,
) -> float:
    """Returns the least noise multiplier with which `epochs` passes over a loader cost at most ε at δ.

    Raises:
        ConfigurationError: for a number out of range, or if steps were taken already.
        AccountingError: if no noise reaches the target.
    """
    check_positive("target_epsilon", epsilon)
    check_count("epochs", epochs, 1)
    if ledger.phases:
        raise ConfigurationError(
            "this engine has steps on its ledger, which the target would have to pay for too. Expected a fresh "
            "engine for make_private_with_epsilon. Make a new PrivacyEngine, or use make_private with a "
            "noise_multiplier of your own."
        )
    steps = epochs * loader.steps_per_pass if loader.sampling.billed_per == "step" else epochs
    planned = Mechanism(sampling=loader.sampling, clipping=policy, noise=noise_of(noise, 1.0), steps=steps)
    return planned.calibrated(
        epsilon=epsilon, delta=delta, accountant=ledger.accountant, relation=ledger.relation
    ).noise.multiplier
