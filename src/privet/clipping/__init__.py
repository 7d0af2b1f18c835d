"""Clipping policies: how much one example may weigh."""

from privet.clipping.flat import Flat
from privet.clipping.per_layer import PerLayer
from privet.clipping.policy import ClippingPolicy

__all__ = ["ClippingPolicy", "Flat", "PerLayer"]
