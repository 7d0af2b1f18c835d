"""Several optimizers as one: Muon for the matrices and AdamW for the rest, or a rate each for backbone and head.

A private step releases one gradient of all parameters, so it belongs to one optimizer. This one hands the step on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from privet.errors import ConfigurationError

__all__ = ["ChainedOptimizer", "with_parts"]


class ChainedOptimizer(torch.optim.Optimizer):
    """Steps several optimizers, each of which has a part of the parameters.

    Its groups and states are theirs: a scheduler may be made of it or of one of them, and its `state_dict` holds all.

    Args:
        *optimizers: at least one. No parameter may be in two of them.

    Raises:
        ConfigurationError: if there is none, one is no optimizer, or two share a parameter.

    Example:
        >>> import torch, privet
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> optimizer = privet.ChainedOptimizer(
        ...     torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.AdamW(net[1].parameters(), lr=1e-3)
        ... )
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.001]
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        if not optimizers:
            raise ConfigurationError("expected at least one optimizer, got none.")
        for each in optimizers:
            if not isinstance(each, torch.optim.Optimizer):
                raise ConfigurationError(f"expected optimizers of torch.optim, got {type(each).__name__}.")
        owners: dict[int, int] = {}
        for place, each in enumerate(optimizers):
            for p in _parameters(each):
                if owners.setdefault(id(p), place) != place:
                    raise ConfigurationError(
                        f"a parameter of shape {tuple(p.shape)} is in optimizers {owners[id(p)]} and {place}. Expected "
                        "each parameter in one of them: it would be moved twice by one gradient."
                    )
        self.optimizers, self._linked = optimizers, False
        super().__init__([p for each in optimizers for p in _parameters(each)], {})
        self._linked = True
        del self.__dict__["_building"]

    def __reduce__(self) -> Any:
        return (type(self), self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of all parts, the very same objects: those that were added to a part later, too."""
        if not self.__dict__.get("_linked"):
            building: list[dict[str, Any]] = self.__dict__.setdefault("_building", [])
            return building
        return [group for each in self.optimizers for group in each.param_groups]

    @param_groups.setter
    def param_groups(self, value: object) -> None:
        """Takes no notice: the parts have the groups."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Returns the states of all parts."""
        parts = getattr(self, "optimizers", ())
        return defaultdict(dict, {p: state for each in parts for p, state in each.state.items()})

    @state.setter
    def state(self, value: object) -> None:
        """Takes no notice: the parts have the states."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every part, after the closure if there is one, and returns what the closure did."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for each in self.optimizers:
            each.step()
        return result

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Hands loaded groups and states on to the parts."""
        groups, states, start = state["param_groups"], state["state"], 0
        for each in self.optimizers:
            own = groups[start : start + len(each.param_groups)]
            start += len(own)
            mine = {id(p) for group in own for p in group["params"]}
            each.__setstate__({"param_groups": own, "state": _of(each, states, mine)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses once the parts are linked: a new group belongs to one of them.

        Raises:
            ConfigurationError: always, with the line to write.
        """
        if self._linked:
            raise ConfigurationError(
                "a group of parameters was to be added to a ChainedOptimizer, and it belongs to one of its parts. "
                "Expected the part. Call optimizer.optimizers[i].add_param_group(group)."
            )
        super().add_param_group(param_group)


def with_parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Returns an optimizer and all that it is made of."""
    parts = optimizer.optimizers if isinstance(optimizer, ChainedOptimizer) else ()
    return [optimizer, *(each for part in parts for each in with_parts(part))]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _of(optimizer: torch.optim.Optimizer, states: Mapping[Any, Any], parameters: set[int]) -> Any:
    """Returns the states of some parameters, in a container of the kind that the optimizer has."""
    kind = type(optimizer.state)
    found = kind(optimizer.state.default_factory) if hasattr(optimizer.state, "default_factory") else kind()
    found.update({p: state for p, state in states.items() if id(p) in parameters})
    return found
