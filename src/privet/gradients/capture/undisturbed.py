"""A module run for a check alone: eagerly, and generators of random numbers and all state are put back as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from privet.gradients.capture.eager import eagerly
from privet.gradients.capture.state import State

__all__ = ["evaluating", "generators", "undisturbed"]


@contextmanager
def undisturbed(module: nn.Module, state: State | None = None) -> Iterator[Callable[[], None]]:
    """Yields a function that puts random generators and state back as they were; they are put back at the end too.

    Args:
        module: what is run.
        state: its state now, if the caller keeps it already.
    """
    state = State(module) if state is None else state
    rewind = generators(module)

    def restore() -> None:
        rewind()
        state.restore()

    try:
        with eagerly():
            yield restore
    finally:
        rewind()
        state.restore(thorough=True)
        torch.clear_autocast_cache()


def generators(module: nn.Module) -> Callable[[], bool]:
    """Returns a function that puts the global random generators back as they are now, and says if they had moved."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - users' own
    cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def rewind() -> bool:
        now = np.random.get_state()  # noqa: NPY002
        moved = random.getstate() != python or now[2:] != numpy[2:] or not np.array_equal(now[1], numpy[1])  # type: ignore[index]
        moved = moved or not torch.equal(torch.get_rng_state(), cpu)
        moved = moved or any(
            not torch.equal(torch.cuda.get_rng_state(device), state)
            for device, state in zip(devices, cuda, strict=True)
        )
        if moved:
            torch.set_rng_state(cpu)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for device, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
        return moved

    return rewind


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Has all parts of a module in eval mode inside of this context: nothing is dropped."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
