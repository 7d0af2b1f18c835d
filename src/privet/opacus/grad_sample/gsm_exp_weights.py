"""The mode "ew", at Opacus's path."""

from privet.opacus.grad_sample.other_modes import GradSampleModuleExpandedWeights

__all__ = ["GradSampleModuleExpandedWeights"]
