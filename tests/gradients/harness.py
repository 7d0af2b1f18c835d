"""Runs a model once under capture, and once by the micro-batch reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import _learn
from privet.gradients.reference import example_gradients, reference_sum
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded

Loss = Callable[[nn.Module, Any], Tensor]  # per example, (B,)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def recorded_of(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, *, learn: bool = True) -> Recorded:
    """Returns what capture records for one batch, layouts learned first from two sizes of it."""
    results: list[Recorded] = []
    capture = Capture(trainable(module), on_backward=results.append)
    size = len(batch[0])
    if learn and size:
        _learn(capture, lambda b: (loss(module, b),), batch, examples=size, batch_axis=0, restore=lambda: None)
    capture.begin(size)
    losses = loss(module, batch)
    capture.end()
    losses.sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is None, f"{name} has a gradient that was not captured"
    return results[0] if results else Recorded(examples=size)


def captured_sum(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, policy: Any) -> dict[str, Tensor]:
    return dict(clipped_sum(recorded_of(module, batch, loss), trainable(module), policy).values)


def reference(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, policy: Any) -> dict[str, Tensor]:
    examples = [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    gradients = example_gradients(module, examples, lambda m, b: loss(m, b).sum())
    return reference_sum(gradients, policy)


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Returns the norm of the difference over the norm of the expected sum, over all parameters at once."""
    assert set(found) == set(expected)
    difference = sum(float((found[n].double() - expected[n].double()).square().sum()) for n in expected)
    size = sum(float(expected[n].double().square().sum()) for n in expected)
    return (difference / size) ** 0.5 if size else difference**0.5
