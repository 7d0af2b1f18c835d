"""What both ways into private training at the paper's door take beside their required arguments, for type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch

from privet.clipping import ClippingPolicy
from privet.sampling import Sampling
from privet.training.accumulate import Accumulate
from privet.training.private_module import GradSampleMode

__all__ = ["Clipping", "Options"]

Clipping = Literal["flat", "per_layer", "automatic", "psac", "adaptive"] | ClippingPolicy


class Options(TypedDict, total=False):
    """The optional arguments of `make_private` and `make_private_with_epsilon`."""

    clipping: Clipping
    loss_reduction: Literal["mean", "sum"]
    batch_first: bool
    poisson_sampling: bool
    sampling: Sampling | None
    dataset_size: int | None
    accumulate: int | Accumulate
    noise_generator: torch.Generator | None
    grad_sample_mode: GradSampleMode
    grad_scaler: torch.amp.GradScaler | None
