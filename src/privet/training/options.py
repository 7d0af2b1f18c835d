"""What both ways into private training at the paper's door take beside their required arguments, for type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch

from privet._checks import check_at_least
from privet.clipping import ClippingPolicy
from privet.errors import ConfigurationError
from privet.noise import Gaussian, Noise
from privet.sampling import Sampling, Users
from privet.training.accumulate import Accumulate
from privet.training.private_module import GradSampleMode
from privet.training.several import refuse_several

__all__ = ["Clipping", "Options", "noise_of"]

Clipping = Literal["flat", "per_layer", "automatic", "psac", "adaptive"] | ClippingPolicy


class Options(TypedDict, total=False):
    """The optional arguments of `make_private` and `make_private_with_epsilon`."""

    clipping: Clipping
    loss_reduction: Literal["mean", "sum"]
    batch_first: bool
    poisson_sampling: bool
    sampling: Sampling | None
    noise: Noise | None
    dataset_size: int | None
    accumulate: int | Accumulate
    noise_generator: torch.Generator | None
    grad_sample_mode: GradSampleMode
    grad_scaler: torch.amp.GradScaler | None
    users: Users | None


def noise_of(noise: Noise | None, multiplier: float) -> Noise:
    """Returns the noise that was given, or Gaussian noise, with this multiplier.

    Raises:
        ConfigurationError: for anything but a description of a noise, or a multiplier out of range.
    """
    multiplier = check_at_least("noise_multiplier", multiplier)
    if noise is None:
        return Gaussian(multiplier)
    if not isinstance(noise, Noise):
        raise ConfigurationError(f"noise must be a description such as BandMF(1.0, (1.0, 0.5)), got {noise!r}.")
    refuse_several(noise)
    return noise.with_multiplier(multiplier)
