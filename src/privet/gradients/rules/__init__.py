"""Rules, one family a file. Importing this package registers all of them."""

from privet.gradients.rules import (
    activation,
    attention,
    bag,
    bilinear,
    convolution,
    embedding,
    free,
    linear,
    normalization,
    recurrent,
)

__all__ = [
    "activation",
    "attention",
    "bag",
    "bilinear",
    "convolution",
    "embedding",
    "free",
    "linear",
    "normalization",
    "recurrent",
]
