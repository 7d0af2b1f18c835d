"""The optimizer of several processes with a clip norm for every parameter, at Opacus's path."""

from privet.opacus.optimizers.ddpoptimizer import SimpleDistributedPerLayerOptimizer

__all__ = ["SimpleDistributedPerLayerOptimizer"]
