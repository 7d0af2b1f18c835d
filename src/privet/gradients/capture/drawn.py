"""Random numbers that are drawn for as many entries as the sequences of the batch are long: is this mixing?

Entries of packed rows are dropped by their place among all rows. If the rows before have other lengths, an example
loses other entries, and nothing is mixed. What the model does beside that shows where nothing is dropped, in its own
mode: a part that is active in training alone is still active then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from privet.gradients.capture.packing import PACKS, RECURRENT

__all__ = ["NothingDropped", "packs"]

_DROPS = frozenset({
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
})  # fmt: skip
"""Functions that drop entries of their first argument, and do nothing else."""
_SHARES = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
"""Functions that also drop, with the place of the share that they are to drop (`dropout_p`)."""


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "").strip("_")


class _Packs(TorchFunctionMode):
    """Sees whether sequences are packed."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or _name(func) == PACKS
        return func(*args, **(kwargs or {}))


def packs(forward: Callable[[], object]) -> bool:
    """Runs a forward, and returns whether it packs sequences, so that its rows are as many as these are long."""
    with _Packs() as watch:
        forward()
    return bool(watch.seen)


class NothingDropped(TorchFunctionMode):
    """A context in which torch's functions drop no entries: they do as if the share to drop were zero.

    Other functions that draw random numbers draw them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), dict(kwargs or {})
        if name in _DROPS:
            return args[0] if args else kwargs["input"]
        if name in RECURRENT:
            args = _without(args, _parameters(args) + 3)
        elif name in _SHARES:
            args = _without(args, _SHARES[name])
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _without(args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    return args if place >= len(args) else (*args[:place], 0.0, *args[place + 1 :])


def _parameters(args: tuple[Any, ...]) -> int:
    """Returns the place of a recurrent function's parameters: the last list of tensors before its options."""
    return max((i for i, a in enumerate(args) if isinstance(a, list | tuple) and _all_tensors(a)), default=len(args))


def _all_tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    return bool(values) and all(isinstance(value, Tensor) for value in values)
