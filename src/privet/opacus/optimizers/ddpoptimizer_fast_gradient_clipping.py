"""The optimizer of several processes for ghost clipping, at Opacus's path."""

from privet.opacus.optimizers.ddpoptimizer import DistributedDPOptimizerFastGradientClipping

__all__ = ["DistributedDPOptimizerFastGradientClipping"]
