"""A module run for a check alone: generators of random numbers and all state are put back as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from privet.gradients.capture.state import State

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(module: nn.Module, state: State | None = None) -> Iterator[Callable[[], None]]:
    """Yields a function that puts random generators and state back as they were; they are put back at the end too.

    Args:
        module: what is run.
        state: its state now, if the caller keeps it already.
    """
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    state = State(module) if state is None else state
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - users' own
    cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for device, generator in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(generator, device)
        state.restore()

    try:
        yield restore
    finally:
        restore()
        torch.clear_autocast_cache()
