"""All that a forward could write: parameters, buffers, and what modules hold as plain attributes.

A forward that writes something of its data there carries it into other examples' outputs, or into a file, without
noise. So the state is kept before a run, looked at after it, and put back.

Looked at are the parts of a module: its submodules, and modules that it holds in a list, a dict or a function. In each
of them values are found in tensors, arrays, numbers, and in lists, tuples, dicts and sets of these.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from privet.gradients.spread import is_part, put_into_parts

__all__ = ["State", "floating_tensors", "same"]

_OWN = frozenset(vars(nn.Module()))
"""What torch itself keeps in a module: its mode, parameters, buffers, submodules and hooks."""
_NUMBERS = (bool, int, float, complex)
_SAMPLE = 4096
_DEPTH = 4
"""How deep containers inside of containers are looked into."""


class State:
    """The state of a module at one moment.

        before = State(module)
        module(inputs)
        before.changes()        # what the forward wrote, by path
        before.restore()

    Args:
        module: whose parameters, buffers and attributes are kept, as copies.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        put_into_parts(module)
        self._parts = _parts_of(module)
        self._closely = False  # whether nothing is only sampled any more
        self._slots = {path: dict(_slots_of(part)) for path, part in self._parts.items()}
        copies: dict[int, Any] = {}  # one copy of each object, by its id
        self._values = {path: copies.setdefault(id(value), _copied(value)) for path, value in self._now()}
        self._contents = {
            path: {name: _Kept(value, copies) for name, value in slots.items()} for path, slots in self._slots.items()
        }

    def _now(self) -> Iterator[tuple[str, Any]]:
        for path, part in self._parts.items():
            for name, value in _slots_of(part):
                yield from _values_in(value, f"{path}.{name}" if path else name)

    def changes(self, *, thorough: bool = True) -> dict[str, Any]:
        """Returns what is new or has another value now, by path, as copies.

        Args:
            thorough: whether every number is compared, or of large tensors a sample: that is enough between two
                thorough looks, and takes much less time.
        """
        changed = {}
        put_into_parts(self._module)
        for path, value in self._now():
            if path not in self._values or not self._is_as_before(path, value, thorough=thorough or self._closely):
                changed[path] = _copied(value)
                self._closely = self._closely or _is_large(value)  # it may change where no sample shows it
        return changed

    def _is_as_before(self, path: str, value: Any, *, thorough: bool) -> bool:
        before = self._values[path]
        if thorough or not _is_large(value) or not isinstance(before, Tensor) or before.shape != value.shape:
            return same(before, value)
        return same(_sampled(before), _sampled(value))

    def terms(self) -> dict[str, Tensor]:
        """Returns the plain tensors that need a gradient, by path: terms of a loss that a forward left for it."""
        return {
            path: value.detach()
            for path, value in self._now()
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf
        }

    @torch.no_grad()
    def restore(self, *, thorough: bool = False) -> None:
        """Puts values, and the objects that hold them, back as they were; large tensors if a sample has changed."""
        put_into_parts(self._module)
        for path, part in self._parts.items():
            before = self._slots[path]
            for name in [name for name, _ in _slots_of(part) if name not in before]:
                _discard(part, name)
            for name, value in before.items():
                if _held(part, name) is not value:
                    _hold(part, name, value)
                self._contents[path][name].put_back(thorough=thorough or self._closely)


# -- the parts, and what each holds ------------------------------------------------------------------------------------


def _parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that a forward may reach, by path: submodules, and modules that are held elsewhere."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        path, part = waiting.pop()
        for name, child in part.named_modules(prefix=path):
            if id(child) in seen:
                continue
            seen.add(id(child))
            found[name] = child
            for attribute, value in vars(child).items():
                if attribute not in _OWN:
                    waiting += _modules_in(value, f"{name}.{attribute}" if name else attribute)
    return found


def _modules_in(value: Any, path: str, depth: int = 0) -> list[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        return [(path, value)]
    inner: list[tuple[str, Any]] = []
    if depth < _DEPTH:
        if isinstance(value, dict):
            inner = [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, list | tuple | deque | set | frozenset):
            inner = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
        elif isinstance(value, partial):
            inner = [(path, each) for each in (value.func, *value.args, *value.keywords.values())]
        elif callable(value):
            cells = getattr(value, "__closure__", None) or ()
            inner = [(path, cell.cell_contents) for cell in cells if not _is_empty(cell)]
            inner.append((path, getattr(value, "__self__", None)))
    return [found for name, each in inner for found in _modules_in(each, name, depth + 1)]


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - it raises for a name that is not bound yet
    except ValueError:
        return True
    return False


def _slots_of(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields parameters, buffers and plain attributes, by name."""
    # Not through named_parameters, which leaves out what is shared. What a forward writes to a gathered parameter is
    # gone with it, so that parts need no copy.
    yield from ((name, value) for name, value in part._parameters.items() if not is_part(value))  # noqa: SLF001
    yield from part._buffers.items()  # noqa: SLF001
    yield from ((name, value) for name, value in vars(part).items() if name not in _OWN)


def _home_of(part: nn.Module, name: str) -> dict[str, Any]:
    for home in (part._parameters, part._buffers):  # noqa: SLF001
        if name in home:
            return home
    return vars(part)


def _held(part: nn.Module, name: str) -> Any:
    return _home_of(part, name).get(name)


def _hold(part: nn.Module, name: str, value: Any) -> None:
    if name not in _home_of(part, name) and isinstance(value, nn.Parameter):
        part._parameters[name] = value  # noqa: SLF001 - it was taken out, as old parametrizations do
    else:
        _home_of(part, name)[name] = value


def _discard(part: nn.Module, name: str) -> None:
    _home_of(part, name).pop(name, None)
    part._non_persistent_buffers_set.discard(name)  # noqa: SLF001 - torch keeps names of such buffers apart


# -- values ------------------------------------------------------------------------------------------------------------


def _values_in(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields (path, value) for each tensor, array and number."""
    if isinstance(value, Tensor):
        if not is_lazy(value):
            yield path, value
    elif isinstance(value, (np.ndarray, *_NUMBERS)):
        yield path, value
    elif depth < _DEPTH:
        if isinstance(value, dict):
            for key, each in list(value.items()):
                yield from _values_in(each, f"{path}[{key!r}]", depth + 1)
        elif isinstance(value, list | tuple | deque):
            for index, each in enumerate(list(value)):
                yield from _values_in(each, f"{path}[{index}]", depth + 1)
        elif isinstance(value, set | frozenset):
            yield from ((f"{path}[{each!r}]", each) for each in value if isinstance(each, _NUMBERS))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if _is_dead(value):
            return float("nan"), "left by vmap"
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 4 * _SAMPLE and value.layout == torch.strided


def _sampled(t: Tensor) -> Tensor:
    """Returns some of a tensor's numbers, spread over all of it."""
    return t.detach().reshape(-1)[:: t.numel() // _SAMPLE] if t.is_contiguous() else t.detach()


def _is_dead(t: Tensor) -> bool:
    """Returns whether a tensor belongs to a transform of functions, such as vmap, and cannot be read outside of it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))  # noqa: SLF001 - there is no public way to ask


def same(a: Any, b: Any, *, tolerance: float = 0.0) -> bool:
    """Returns whether two values are equal, NaN to NaN, or differ by at most `tolerance` of the larger one."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if _is_dead(a) or _is_dead(b):
            return False
        return _same_tensors(a, b, tolerance)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b or (a != a and b != b))  # noqa: PLR0124 - NaN is what differs from itself


def _same_tensors(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a is b or a.is_meta:
        return True
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= tolerance * torch.maximum(a.abs().max(), b.abs().max()))


class _Kept:
    """What an object held, to be put back into the same object."""

    def __init__(self, value: Any, copies: Mapping[int, Any], depth: int = 0) -> None:
        self._value = value
        self._inner: list[_Kept] = []
        self._copy: Any = None
        if isinstance(value, Tensor | np.ndarray):
            self._copy = copies.get(id(value))
        elif isinstance(value, torch.Generator):
            self._copy = value.get_state()
        elif isinstance(value, random.Random):
            self._copy = value.getstate()
        elif isinstance(value, np.random.Generator):
            self._copy = copy.deepcopy(value.bit_generator.state)
        elif isinstance(value, dict | list | deque | set):
            self._copy = value.copy()
        if depth < _DEPTH and isinstance(value, dict | list | tuple | deque):
            each = value.values() if isinstance(value, dict) else value
            self._inner = [_Kept(v, copies, depth + 1) for v in each]

    def put_back(self, *, thorough: bool) -> None:
        """Puts the object's contents back, if it has any that can change."""
        value, kept = self._value, self._copy
        if isinstance(value, Tensor):
            quick = not thorough and _is_large(value)
            if kept is not None and not (same(_sampled(value), _sampled(kept)) if quick else same(value, kept)):
                value.detach().copy_(kept)  # only then: versions stay where nothing was written
        elif isinstance(value, np.ndarray):
            value[...] = kept
        elif isinstance(value, torch.Generator):
            value.set_state(kept)
        elif isinstance(value, random.Random):
            value.setstate(kept)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = kept
        elif isinstance(value, dict | set):
            if value != kept if isinstance(value, set) else not _alike(value, kept):
                value.clear()
                value.update(kept)
        elif isinstance(value, list | deque) and not _alike(dict(enumerate(value)), dict(enumerate(kept))):
            value.clear()
            value.extend(kept)
        for inner in self._inner:
            inner.put_back(thorough=thorough)


def _alike(now: Mapping[Any, Any], kept: Mapping[Any, Any]) -> bool:
    return list(now) == list(kept) and all(now[key] is kept[key] for key in kept)


def floating_tensors(module: nn.Module) -> list[Tensor]:
    """Returns each parameter, buffer and plain tensor of a module's parts that holds floating-point numbers, once."""
    found: dict[int, Tensor] = {}
    for part in _parts_of(module).values():
        for _, value in _slots_of(part):
            for t in _tensors_in(value):
                if (t.is_floating_point() or t.is_complex()) and t.is_leaf and not is_lazy(t):
                    found[id(t)] = t
    return list(found.values())


def _tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEPTH and isinstance(value, dict | list | tuple | deque):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each, depth + 1)
