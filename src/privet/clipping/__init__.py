"""Clipping policies: how much one example may weigh."""

from privet.clipping.adaptive import Adaptive
from privet.clipping.automatic import Automatic
from privet.clipping.flat import Flat
from privet.clipping.group_wise import GroupWise
from privet.clipping.per_layer import PerLayer
from privet.clipping.policy import ClippingPolicy
from privet.clipping.psac import PSAC
from privet.clipping.table import is_proven, policy_for

__all__ = [
    "PSAC",
    "Adaptive",
    "Automatic",
    "ClippingPolicy",
    "Flat",
    "GroupWise",
    "PerLayer",
    "is_proven",
    "policy_for",
]
