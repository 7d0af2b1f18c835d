"""Ghost clipping, at Opacus's path."""

from privet.opacus.grad_sample.fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)

__all__ = ["GradSampleHooksFastGradientClipping", "GradSampleModuleFastGradientClipping"]
