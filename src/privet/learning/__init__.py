"""Better learning at the same epsilon: what is averaged, corrected and measured around a private step."""

from privet.learning.adam import AdamBC
from privet.learning.averaging import WeightAverage
from privet.learning.sharpness import SharpnessAware
from privet.learning.statistics import Moments, norm_quantile, private_moments, private_quantile
from privet.learning.views import Augmented, RandomCrop

__all__ = [
    "AdamBC",
    "Augmented",
    "Moments",
    "RandomCrop",
    "SharpnessAware",
    "WeightAverage",
    "norm_quantile",
    "private_moments",
    "private_quantile",
]
