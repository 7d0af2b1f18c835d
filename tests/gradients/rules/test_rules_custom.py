"""Rules of the user's own: for a module class, and for a torch function."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from privet.clipping import Flat
from privet.errors import CoverageError, UnsupportedModelError
from privet.gradients import register_rule
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.custom_modules import watch_custom_modules
from privet.gradients.capture.instrument import Instrument
from privet.gradients.rules import custom, registry
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded
from tests.contracts.doors import Expected, reference, relative_error
from tests.gradients.harness import trainable


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.scale(torch.tanh(self.first(x))))


class Power(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.exponent = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.float_power(self.first(x).exp(), self.exponent).float()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    modules, handlers = dict(custom._MODULES), dict(registry._HANDLERS)
    yield
    custom._MODULES.clear()
    custom._MODULES.update(modules)
    registry._HANDLERS.clear()
    registry._HANDLERS.update(handlers)


def _scale_rule(module: Scale, inputs: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Tensor]:
    calls.append(len(gradient))
    (x,) = inputs
    back = gradient @ module.inner.weight
    return {
        "weight": back * x,
        "inner.weight": torch.einsum("bo,bi->boi", gradient, x * module.weight),
        "inner.bias": gradient,
    }


calls: list[int] = []


def _summed(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    kept: list[Recorded] = []
    instrument = Instrument(module, trainable(module), on_backward=kept.append)
    module(x).square().sum().backward()
    found = dict(clipped_sum(kept[0], trainable(module), Flat(0.3)).values)
    instrument.remove()
    return found


def _expected(module: nn.Module, x: Tensor) -> Expected:
    return reference(module, (x,), lambda m, b: m(*b).square().sum(1), Flat(0.3))


def test_a_rule_for_a_module_class_is_used_and_right() -> None:
    calls.clear()
    register_rule(Scale)(_scale_rule)
    net, x = Net(), torch.randn(5, 4)
    assert relative_error(_summed(net, x), _expected(net, x)) < 1e-5
    assert calls, "the rule was not called"


def test_a_wrong_rule_is_caught_on_the_first_batch() -> None:
    def wrong(module: Scale, inputs: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Tensor]:
        return {name: 0.5 * rows for name, rows in _scale_rule(module, inputs, gradient).items()}

    register_rule(Scale)(wrong)
    with pytest.raises(CoverageError, match="scale"):
        _summed(Net(), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda module, inputs, gradient: {"weight": gradient}, "none for inner.weight"),
        (lambda module, inputs, gradient: dict.fromkeys(("weight", "inner.weight", "inner.bias"), gradient), "shape"),
    ],
)
def test_a_rule_that_leaves_out_or_misshapes_is_refused(rule: object, said: str) -> None:
    register_rule(Scale)(rule)  # type: ignore[type-var]
    with pytest.raises(UnsupportedModelError, match=said):
        _summed(Net(), torch.randn(5, 4))


def test_a_rule_for_a_torch_function_is_used_and_right() -> None:
    used = []

    @register_rule(torch.float_power)
    def power(gradient: Tensor, base: Tensor, exponent: Tensor) -> dict[int, Tensor]:
        used.append(len(gradient))
        return {1: (gradient * torch.float_power(base, exponent) * base.log()).to(exponent.dtype)}

    net, x = Power(), torch.randn(5, 4)
    assert relative_error(_summed(net, x), _expected(net, x)) < 1e-5
    assert used


def test_a_subclass_of_a_registered_class_does_not_inherit_the_rule() -> None:
    class Twice(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    calls.clear()
    register_rule(Scale)(_scale_rule)
    net, x = Net(), torch.randn(5, 4)
    net.scale = Twice()
    assert relative_error(_summed(net, x), _expected(net, x)) < 1e-5
    assert not calls


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="Module class or a torch function"):
        register_rule(3)


def test_capture_has_no_hooks_for_modules_without_a_rule() -> None:
    capture = Capture({})
    assert watch_custom_modules(Net(), capture) == []
