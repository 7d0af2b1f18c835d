"""The mode "no_op", at Opacus's path."""

from privet.opacus.grad_sample.other_modes import GradSampleHooksNoOp, GradSampleModuleNoOp

__all__ = ["GradSampleHooksNoOp", "GradSampleModuleNoOp"]
