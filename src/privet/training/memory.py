"""A criterion must not remember: a loss that is rescaled by earlier losses mixes their examples into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from privet.errors import ConfigurationError
from privet.gradients.capture.state import State, same
from privet.gradients.capture.undisturbed import undisturbed

__all__ = ["refuse_memory"]

_TOLERANCE = 1e-4


@torch.no_grad()
def refuse_memory(
    holder: nn.Module,
    losses: Callable[[list[Tensor]], Tensor],
    tensors: list[Tensor],  # (B, ...) each
) -> None:
    """Raises if a criterion writes something of its data, or gives another loss when it is called again.

    Its state and torch's global generators are put back.

    Args:
        holder: a module that holds the criterion, as a submodule or an attribute.
        losses: returns the loss of each example for tensors like these.
        tensors: what the criterion is called with, at least one example.

    Raises:
        ConfigurationError: if the criterion remembers, with the path of what it writes if that can be seen.
    """
    state = State(holder)
    with undisturbed(holder, state) as restore:
        first = losses(tensors)
        written = state.changes()
        restore()
        try:
            losses([_of_first(t, 1.25) for t in tensors])
        except Exception:  # noqa: BLE001 - it may want numbers within bounds
            restore()
            losses([_of_first(t, 1.0) for t in tensors])
        others = state.changes()
        restore()
        again = losses(tensors)
    paths = [p for p in dict.fromkeys((*written, *others)) if not same(written.get(p), others.get(p))]
    if paths:
        found = f"writes something of the examples into {', '.join(paths)}"
    elif not same(first.detach(), again.detach(), tolerance=_TOLERANCE):
        found = "gives other losses when it is called again with the same tensors"
    else:
        return
    raise ConfigurationError(
        f"criterion {found}: it remembers examples, and lets them change the losses of others, without noise. Expected "
        "a loss that depends on its arguments alone. Take averages over one example, or compute them before training "
        "from public data."
    )


def _of_first(t: Tensor, factor: float) -> Tensor:
    """Returns other examples: copies of the first, scaled where that makes another number."""
    copies = t[:1].expand_as(t)
    return copies * factor if t.is_floating_point() and factor != 1.0 else copies.clone()
