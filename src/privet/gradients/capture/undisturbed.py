"""A module run for a check alone: generators of random numbers and buffers are put back as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields a function that puts random generators and buffers back as they were; they are put back at the end too."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - users' own
    cuda = [torch.cuda.get_rng_state(device) for device in devices]

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])

    try:
        yield restore
    finally:
        restore()
        torch.clear_autocast_cache()
