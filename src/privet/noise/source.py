"""The role of a noise source, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from privet.noise.counter import CounterNoise, Offsets, Piece
from privet.noise.device import DeviceNoise
from privet.noise.key import NoiseKey
from privet.noise.secure import SecureNoise

__all__ = ["DeviceNoise", "NoiseKey", "NoiseSource", "Offsets", "Piece", "SecureNoise", "noise_for"]


class NoiseSource(Protocol):
    """Whoever adds noise: a function of (key, step, parameter name, index), so that order and sharding do not matter.

    A source with memory over steps (correlated noise) is one more object of this role: it adds a combination of what an
    addressed source gives for this step and for earlier ones, which can be drawn again instead of stored.
    """

    @property
    def secure(self) -> bool:
        """Returns whether the values are cryptographically unpredictable."""

    @property
    def predictable(self) -> bool:
        """Returns whether the run is reproducible, and so not private."""

    def add_many(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None = None
    ) -> None:
        """Adds noise of standard deviation `std` to every named tensor; `offsets` say where shards lie."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes with a fresh key, unless the run is reproducible."""


def noise_for(device: torch.device | str, *, secure_mode: bool, key: NoiseKey) -> CounterNoise:
    """Returns the source for a device: the host's on CPU and where a device has no float64, else the device's own.

    Both are cryptographically secure, so that `secure_mode`, which demands it, changes nothing here.
    """
    kind = torch.device(device).type
    source = SecureNoise(key) if kind in {"cpu", "mps", "meta"} else DeviceNoise(key)
    assert source.secure or not secure_mode
    return source
