"""Poisson samplers, at Opacus's path."""

from privet.opacus.samplers import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler

__all__ = ["DistributedUniformWithReplacementSampler", "UniformWithReplacementSampler"]
