"""How large the terms are that add up to each parameter's gradient, before they cancel.

The difference between two ways to add the same terms is rounding, and is as large as the terms make it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from privet.gradients.derived import Derivation
from privet.gradients.use import Recorded, Use

__all__ = ["HALF", "is_coarse", "terms_of"]

HALF = (torch.float16, torch.bfloat16)


def _all_uses(recorded: Recorded) -> list[Use]:
    return [use for uses in (*recorded.direct.values(), *recorded.derived.values()) for use in uses]


def is_coarse(recorded: Recorded) -> bool:
    """Returns whether something was computed in half precision."""
    return any(t is not None and t.dtype in HALF for use in _all_uses(recorded) for t in (use.gradient, *use.data))


def terms_of(recorded: Recorded) -> dict[str, float]:
    """Returns a bound of the size of what is added up in each parameter's gradient, within examples too.

    The terms of a bias are the gradients of all positions; those of a weight, their products with the inputs. The
    biases of keys in attention have a sum of zero, of terms that are not.
    """
    squared: dict[str, float] = {}
    found: list[tuple[str | Derivation, list[Use]]] = [*recorded.direct.items(), *recorded.derived.items()]
    for target, uses in found:
        names = target.sources if isinstance(target, Derivation) else (target,)
        for use in uses:
            met = [_longest(t) for t in use.data if t is not None and t.is_floating_point()]
            term = float(torch.linalg.vector_norm(use.gradient.detach(), dtype=_wide(use.gradient))) * max([1.0, *met])
            for name in names:
                squared[name] = squared.get(name, 0.0) + term * term  # a power overflows with an error
    return {name: value**0.5 for name, value in squared.items()}


def _longest(t: Tensor) -> float:
    """Returns the largest norm of a vector on the last axis."""
    if t.dim() == 0 or t.numel() == 0:
        return 1.0
    return float(torch.linalg.vector_norm(t.detach(), dim=-1, dtype=_wide(t)).max())


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
