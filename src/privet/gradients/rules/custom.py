"""Rules of the user's own: for a module class of theirs, or for a torch function that has no rule here.

    @register_rule(MyScale)
    def my_scale(module, inputs, gradient):          # gradient: (B, ...), of the loss with respect to the output
        return {"weight": (gradient * inputs[0]).sum(1)}         # (B, *weight.shape)

    @register_rule(torch.special.zeta)
    def zeta(gradient, *args, **kwargs):
        return {1: ...}                                # by the place or the keyword of the parameter

A rule is checked like all others: on the first batch, against autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.rules.functional import mapped_call
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Uses

__all__ = ["ModuleUse", "module_rule", "register_rule"]

ModuleRule = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, Tensor]]
F = TypeVar("F", bound=Callable[..., Any])

_MODULES: dict[type[nn.Module], ModuleRule] = {}


def register_rule(target: Any) -> Callable[[F], F]:
    """Returns a decorator that registers a rule for a module class, or for a torch function.

    For a module class the rule is called as `rule(module, inputs, gradient)`, the inputs being the positional
    arguments of the forward, and returns the per-example gradients `(B, *shape)` of all trainable parameters by their
    names in the module. It holds for instances of exactly that class. For a function it is called as
    `rule(gradient, *args, **kwargs)`, and returns them by the parameter's position or keyword.

    Raises:
        ConfigurationError: if the target is neither.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):

        def of_module(rule: F) -> F:
            _MODULES[target] = rule
            return rule

        return of_module
    if not callable(target):
        raise ConfigurationError(
            f"register_rule takes a torch.nn.Module class or a torch function, got {target!r}. For a function of your "
            "own, make it the forward of a module."
        )

    def of_function(rule: F) -> F:
        def handler(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return mapped_call(call, func, args, kwargs, user_rule=rule)

        handles(target)(handler)
        return rule

    return of_function


def module_rule(module: nn.Module) -> ModuleRule | None:
    """Returns the rule registered for exactly the module's class, or None."""
    return _MODULES.get(type(module))


class _ModuleParameter(Rule):
    """One parameter of a module whose rule the user wrote."""

    def __init__(self, name: str) -> None:
        self._name = name

    def per_example(self, uses: Uses) -> Tensor:
        total: Tensor | None = None
        for use in uses:
            operation = use.operation
            assert isinstance(operation, ModuleUse)
            rows = operation.rows(self._name, [d for d in use.data if d is not None], use.gradient, use.shape)
            total = rows if total is None else total + rows
        assert total is not None
        return total


class ModuleUse(Operation):
    """A module as one operation: its output passes through, and its rule gets the inputs and the output's gradient."""

    repeatable = False  # the module's own graph lies behind its output

    def __init__(self, module: nn.Module, rule: ModuleRule, inputs: Sequence[Any], names: Sequence[str]) -> None:
        self._module = module
        self._rule = rule
        self._inputs = tuple(None if isinstance(i, Tensor) else (i,) for i in inputs)
        self.rules = {name: _ModuleParameter(name) for name in names}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the output, which comes last among the data."""
        return data[-1].clone()

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the output's gradient, which goes on through the module by torch's own autograd."""
        return [*(None for _ in data[:-1]), gradient]

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns the inputs."""
        return [*data[:-1], None]

    def rows(self, name: str, data: Sequence[Tensor], gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the per-example gradients of one parameter, by the user's rule."""
        tensors = iter(data)
        inputs = tuple(next(tensors) if i is None else i[0] for i in self._inputs)
        kind = type(self._module).__name__
        try:
            found = self._rule(self._module, inputs, gradient)
        except TypeError as error:
            raise UnsupportedModelError(
                f"the rule registered for {kind} failed: {error} Expected rule(module, inputs, gradient), in which "
                "inputs is the tuple of the module's arguments, that returns per-example gradients by the parameters' "
                "names. A grad sampler of Opacus has activations in place of inputs, and parameters in place of names."
            ) from error
        if name not in found:
            raise UnsupportedModelError(
                f"the rule registered for {kind} returned gradients for {sorted(found)} and none for {name}. Expected "
                "every trainable parameter of the module."
            )
        rows, expected = found[name], (gradient.shape[0], *shape)
        if tuple(getattr(rows, "shape", ())) != expected:
            got = getattr(rows, "shape", type(rows).__name__)
            raise UnsupportedModelError(
                f"the rule registered for {kind} returned {got} for {name}. Expected per-example gradients of shape "
                f"{expected}."
            )
        return rows.detach()
