"""The table of policies under test: a new policy is one new row, made for a module's parameters and a bound."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from privet.clipping import PSAC, Automatic, ClippingPolicy, Flat, GroupWise, PerLayer
from tests.gradients.harness import trainable


def grouped(module: nn.Module, bound: float) -> GroupWise:
    """Returns two groups whose members lie far apart in the model, with different bounds; one for one parameter."""
    names = list(trainable(module))
    members = {"even": names[::2], "odd": names[1::2]} if len(names) > 1 else {"even": names}
    bounds = {"even": 0.6 * bound, "odd": 0.8 * bound}
    return GroupWise({group: bounds[group] for group in members}, members)


POLICIES: dict[str, Callable[[nn.Module, float], ClippingPolicy]] = {
    "flat": lambda module, bound: Flat(bound),
    "per layer": lambda module, bound: PerLayer(bound),
    "automatic": lambda module, bound: Automatic(bound),
    "psac": lambda module, bound: PSAC(bound),
    "group-wise": grouped,
}


def policies(module: nn.Module, bound: float) -> dict[str, ClippingPolicy]:
    return {name: make(module, bound) for name, make in POLICIES.items()}


def weights_an_example(policy: ClippingPolicy, module: nn.Module) -> int:
    """Returns how many weights the policy gives an example."""
    return len(set(policy.groups(list(trainable(module)))))
