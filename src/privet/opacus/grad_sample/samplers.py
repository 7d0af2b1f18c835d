"""Grad samplers: functions that compute a layer's per-example gradients, as Opacus registers them.

A sampler is called as `sampler(layer, activations, backprops)` and returns `{parameter: rows}`. `activations` is the
list of the layer's inputs and `backprops` the gradient of its output, both with the batch on axis 0, the gradient
of a mean already multiplied by the number of examples. Rows are `(B, *parameter.shape)`.

The core has rules of its own for torch's layers. A sampler that you register is used for exactly the class it is
registered for, and is held against autograd on the first batch like every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from privet.gradients.capture.instrument import Instrument
from privet.gradients.rules.custom import register_rule
from privet.gradients.summation import per_example_gradients
from privet.gradients.use import Recorded
from privet.opacus.modules import trainable_parameters

__all__ = ["GRAD_SAMPLERS", "NORM_SAMPLERS", "compute_grad_sample", "register_grad_sampler", "register_norm_sampler"]

GradSampler = Callable[[Any, list[Tensor], Tensor], Mapping[nn.Parameter, Tensor]]
F = TypeVar("F", bound=Callable[..., Any])

GRAD_SAMPLERS: dict[type, GradSampler] = {}
NORM_SAMPLERS: dict[type, Callable[..., Mapping[nn.Parameter, Tensor]]] = {}


def register_grad_sampler(target_class_or_classes: type | Sequence[type]) -> Callable[[F], F]:
    """Returns a decorator that registers a grad sampler for classes of layers.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(4))
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return x * self.weight
        >>> @register_grad_sampler(Scale)
        ... def compute_scale_grad_sample(layer, activations, backprops):
        ...     return {layer.weight: activations[0] * backprops}
    """

    def register(sampler: F) -> F:
        for target in _listed(target_class_or_classes):
            GRAD_SAMPLERS[target] = sampler
            if sampler is not compute_grad_sample:  # the core's own rules are what that one asks
                register_rule(target)(_rule_of(sampler))
        return sampler

    return register


def register_norm_sampler(target_class_or_classes: type | Sequence[type]) -> Callable[[F], F]:
    """Returns a decorator that registers a norm sampler, which computes the norms of gradients without the gradients.

    It is kept at `GradSampleModuleFastGradientClipping.NORM_SAMPLERS`, and not called: the core's own norms are bounds
    that hold, and those of a function of the user's own could not be held against the sums that are released.
    """

    def register(sampler: F) -> F:
        NORM_SAMPLERS.update(dict.fromkeys(_listed(target_class_or_classes), sampler))
        return sampler

    return register


def _listed(targets: type | Sequence[type]) -> Sequence[type]:
    return targets if isinstance(targets, Sequence) else [targets]


def _rule_of(sampler: GradSampler) -> Callable[[nn.Module, tuple[Any, ...], Tensor], dict[str, Tensor]]:
    """Returns a sampler as a rule of the core, which has rows by the names of the parameters."""

    def rule(module: nn.Module, inputs: tuple[Any, ...], gradient: Tensor) -> dict[str, Tensor]:
        rows = sampler(module, list(inputs), gradient)
        return {name: rows[p] for name, p in module.named_parameters() if p in rows}

    return rule


def compute_grad_sample(
    layer: nn.Module, activations: Sequence[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Returns the per-example gradients of one layer, by the core's rules.

    Args:
        layer: any layer that treats each example by itself.
        activations: its inputs, the batch on axis 0.
        backprops: the gradient of its output, the batch on axis 0.
    """
    parameters, brought = dict(trainable_parameters(layer)), list[Recorded]()
    instrument = Instrument(layer, parameters, on_backward=brought.append)
    try:
        with torch.enable_grad():
            layer(*activations).backward(backprops)
    finally:
        instrument.remove()
    rows = per_example_gradients(brought[0], parameters)
    return {p: rows[name] for name, p in parameters.items() if name in rows}
