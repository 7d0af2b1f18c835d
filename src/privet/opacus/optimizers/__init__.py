"""Private optimizers at Opacus's names."""

from __future__ import annotations

from privet.opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer
from privet.opacus.optimizers.ddpoptimizer import (
    DistributedDPOptimizer,
    DistributedDPOptimizerFastGradientClipping,
    SimpleDistributedPerLayerOptimizer,
)
from privet.opacus.optimizers.optimizer import DPOptimizer
from privet.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from privet.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

__all__ = [
    "AdaClipDPOptimizer",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPPerLayerOptimizer",
    "DistributedDPOptimizer",
    "DistributedDPOptimizerFastGradientClipping",
    "SimpleDistributedPerLayerOptimizer",
    "get_optimizer_class",
]

_CLASSES: dict[tuple[str, bool, bool], type[DPOptimizer]] = {
    ("flat", False, False): DPOptimizer,
    ("flat", False, True): DPOptimizerFastGradientClipping,
    ("flat", True, False): DistributedDPOptimizer,
    ("flat", True, True): DistributedDPOptimizerFastGradientClipping,
    ("per_layer", False, False): DPPerLayerOptimizer,
    ("per_layer", True, False): SimpleDistributedPerLayerOptimizer,
    ("adaptive", False, False): AdaClipDPOptimizer,
}


def get_optimizer_class(
    clipping: str,
    distributed: bool,  # noqa: FBT001 - Opacus's signature
    grad_sample_mode: str | None = None,
) -> type[DPOptimizer]:
    """Returns the class of a clipping, in one process or several. Raises ValueError where there is none."""
    found = _CLASSES.get((clipping, bool(distributed), grad_sample_mode == "ghost"))
    if found is None:
        raise ValueError(
            f"there is no optimizer for clipping={clipping!r}, distributed={distributed} and "
            f"grad_sample_mode={grad_sample_mode!r}. Expected 'flat'; or, without ghost clipping, 'per_layer', or in "
            "one process 'adaptive'."
        )
    return found
