"""The fallback: any operation, by a vmap of its vector-Jacobian product with all its inputs.

Slow, general, exact. It asks two things of an operation: that the examples lie in the same way in every tensor that
varies with them, outputs included (on axis 0, on axis 1, or merged with positions on axis 0), and that it is not
random. Where either fails it raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from privet.errors import UnsupportedModelError
from privet.gradients.layout import Layout
from privet.gradients.rules.registry import Call
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.use import Operation, Rule, Uses

__all__ = ["Mapped", "fallback", "mapped_call"]


_ROW_BY_ROW = {F.linear, F.embedding, F.layer_norm, F.prelu, torch.prelu}


class Mapped(Operation):
    """Any function of data (examples on axis 0) and parameters, by its leaves in order."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        tree: Any,
        name: str,
        *,
        layout: Layout = Layout.ROWS,
        user_rule: Callable[..., Mapping[int | str, Tensor]] | None = None,
    ) -> None:
        self.layout = layout
        self._function = function
        self._leaves = tuple(leaves)  # ("data", k), ("value", role) or a constant in a tuple of one
        self._tree = tree
        self._user_rule = user_rule
        self.name = name
        self.rules = {part[1]: _MappedRule(self, part[1]) for part in leaves if part[0] == "value"}
        self._values: Mapping[str, Tensor] = {}
        self._autocast: torch.autocast | None = None

    def _arguments(self, data: Sequence[Tensor], values: Mapping[str, Any]) -> Any:
        """Returns the arguments as the user wrote them."""
        filled = []
        for part in self._leaves:
            match part:
                case ("data", int(k)):
                    filled.append(data[k])
                case ("value", str(role)):
                    filled.append(values[role])
                case ("constant", constant):
                    filled.append(constant)
        return tree_unflatten(filled, self._tree)

    def run(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Any:
        """Returns the function's output."""
        args, kwargs = self._arguments(data, values)
        with self._autocast or nullcontext():
            return self._function(*args, **kwargs)

    @property
    def data_count(self) -> int:
        """Returns how many of the arguments are data."""
        return sum(1 for part in self._leaves if part[0] == "data")

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Any:
        """Returns the function's output, after a look at its shape."""
        self._values = dict(values)
        device = data[0].device.type
        if torch.is_autocast_enabled(device):  # a backward runs outside of it, and has to run the function again
            self._autocast = torch.autocast(device, torch.get_autocast_dtype(device))
        output = self.run(data, values)
        outputs = output if isinstance(output, tuple | list) else (output,)
        axis = self.layout.axis
        rows = data[0].shape[axis]
        for o in outputs:
            if not isinstance(o, Tensor) or o.dim() <= axis or o.shape[axis] != rows:
                found = tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__
                raise UnsupportedModelError(
                    f"{self.name} returned {found} for a batch of {rows}. Expected a tensor with the batch on axis "
                    f"{axis}. Register a rule of your own for it (privet.register_rule)."
                )
        return output if isinstance(output, Tensor) else tuple(outputs)

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Copies the values, with which the function is run again for each example."""
        self._values = {role: value.clone() for role, value in values.items()}

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Any, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradients of the data, from a second run with autograd."""
        wanted = [k for k, need in enumerate(needed) if need]
        gradients = gradient if isinstance(gradient, tuple) else (gradient,)
        with torch.enable_grad():
            inputs = [d.detach().requires_grad_(k in wanted) for k, d in enumerate(data)]
            output = self.run(inputs, values)
            outputs = output if isinstance(output, tuple | list) else (output,)
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs], [inputs[k] for k in wanted], [g for _, g in pairs], allow_unused=True
            )
        by_place = dict(zip(wanted, found, strict=True))
        return [by_place.get(k) for k in range(len(data))]

    def row_gradients(self, role: str, data: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Returns the gradient of one parameter for each row, (R, *shape)."""
        if self._user_rule is not None:
            return self._by_user_rule(role, data, gradients)

        def one(row: Sequence[Tensor], row_gradients: Sequence[Tensor]) -> Tensor:
            def of_value(value: Tensor) -> Any:
                output = self.run([self._alone(d) for d in row], {**self._values, role: value})
                return tuple(output) if isinstance(output, tuple | list) else (output,)

            pullback = torch.func.vjp(of_value, self._values[role])[1]
            (result,) = pullback(tuple(self._alone(g) for g in row_gradients))
            return result  # type: ignore[no-any-return]

        try:
            with warnings.catch_warnings():  # an operation without a batching rule is slow, which is expected here
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                return torch.vmap(one)(list(data), list(gradients))
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"{self.name} could not be mapped over the examples: {error} Register a rule of your own for it "
                "(privet.register_rule)."
            ) from error

    def _alone(self, example: Tensor) -> Tensor:
        """Returns one example as the function sees a batch of it alone."""
        if self.layout in (Layout.MERGED, Layout.TURNED):
            return example
        if self.layout in (Layout.SECOND_MERGED, Layout.SECOND_TURNED):
            return example.movedim(0, 1)
        return example.unsqueeze(self.layout.axis)

    def _by_user_rule(self, role: str, data: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        assert self._user_rule is not None
        args, kwargs = self._arguments(data, self._values)
        places, named = self._arguments([None] * len(data), {r: r for r in self._values})  # type: ignore[list-item]
        found = self._user_rule(gradients[0] if len(gradients) == 1 else tuple(gradients), *args, **kwargs)
        place = next((k for k, p in (*enumerate(places), *named.items()) if p == role), None)
        expected = (gradients[0].shape[0], *self._values[role].shape)
        rows = found.get(place) if place is not None else None
        if not isinstance(rows, Tensor) or tuple(rows.shape) != expected:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else "nothing"
            raise UnsupportedModelError(
                f"the rule registered for {self.name} returned {got} for the parameter at {place!r}. Expected "
                f"per-example gradients of shape {expected}, by the parameter's position or keyword."
            )
        return rows


class _MappedAcross(Mapped):
    """A function of data in which the examples are not axis 0 alone: its uses come with all else behind them."""

    positionwise = True


class _MappedRule(Rule):
    """One parameter of a mapped operation."""

    def __init__(self, operation: Mapped, role: str) -> None:
        self._operation = operation
        self._role = role

    def per_example(self, uses: Uses) -> Tensor:
        total: Tensor | None = None
        for use in uses:
            operation = use.operation
            assert isinstance(operation, Mapped)
            count = operation.data_count
            data = [d for d in use.data[:count] if d is not None]
            gradients = [use.gradient, *(d for d in use.data[count:] if d is not None)]
            size = 4 * max(1, use.gradient[:1].numel() + sum(d[:1].numel() for d in data))
            parts = [
                operation.row_gradients(use.role, [d[c] for d in data], [g[c] for g in gradients])
                for c in row_chunks(use.rows, size)
            ]
            rows = torch.cat(parts) if parts else use.gradient.new_zeros(0, *use.shape)
            total = rows if total is None else total + rows
        assert total is not None
        return total


def fallback(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns `func(*args, **kwargs)` with its parameters captured, whatever it is; see `mapped_call`.

    Rows of a packed sequence are put back by example, filled up with zeros, for functions that treat each row alike.
    """
    rows = args[0] if args else None
    if func in _ROW_BY_ROW and isinstance(rows, Tensor) and call.layout(rows) is Layout.ROUTED:
        by_example = call.by_example(rows)
        if by_example is not None:
            return call.as_rows(call.again(func, by_example, *args[1:], **kwargs), rows)
    return mapped_call(call, func, args, kwargs)


def mapped_call(
    call: Call,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    user_rule: Callable[..., Mapping[int | str, Tensor]] | None = None,
) -> Any:
    """Returns `func(*args, **kwargs)` with its parameters captured, by vmap or by a rule of the user's own.

    Raises:
        UnsupportedModelError: if the batch is not on axis 0 of an argument, or an argument without a batch axis was
            computed from parameters in a way that was not captured.
    """
    leaves, tree = tree_flatten((args, kwargs))
    name = getattr(func, "__name__", str(func))
    data: list[Tensor] = []
    roots: dict[str, Tensor | None] = {}
    parts: list[tuple[str, Any]] = []
    for leaf in leaves:
        if call.is_root(leaf):
            role = f"parameter {len(roots)}"
            parts.append(("value", role))
            roots[role] = leaf
        elif isinstance(leaf, Tensor) and call.layout(leaf) is not Layout.CONSTANT:
            first = call.layout(data[0] if data else leaf)
            unknown = first is Layout.ROUTED or (user_rule is not None and first is not Layout.ROWS)
            if call.layout(leaf) is not first or unknown:
                raise UnsupportedModelError(
                    f"{name} of {_named(call, leaves)} met data of shape {tuple(leaf.shape)} in which "
                    f"{call.layout(leaf).value}. Expected the batch on axis 0 there. Move it, or register a rule of "
                    "your own (privet.register_rule)."
                )
            parts.append(("data", len(data)))
            data.append(leaf)
        elif isinstance(leaf, Tensor) and leaf.requires_grad:
            raise UnsupportedModelError(
                f"{name} of {_named(call, leaves)} met a tensor of shape {tuple(leaf.shape)} that needs a gradient and "
                "has no batch axis: it mixes examples, or comes from a parameter in a way that is not captured."
            )
        else:
            parts.append(("constant", leaf))
    layout = call.layout(data[0]) if data else Layout.ROWS
    kind = Mapped if layout is Layout.ROWS else _MappedAcross
    operation = kind(func, parts, tree, f"{name} of {_named(call, leaves)}", layout=layout, user_rule=user_rule)
    return call.apply(operation, data, roots, layout=layout)


def _named(call: Call, leaves: Sequence[Any]) -> str:
    return ", ".join(call.label(leaf) for leaf in leaves if call.is_root(leaf))
