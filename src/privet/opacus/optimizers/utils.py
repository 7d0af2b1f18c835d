"""The parameters of an optimizer, at Opacus's path."""

from privet.opacus.optimizers.optimizer import params

__all__ = ["params"]
