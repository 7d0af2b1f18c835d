"""A number of the private optimizer that changes from epoch to epoch: what noise and clip norm have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["Exponential", "Lambda", "Scheduler", "Step"]


class Scheduler:
    """Sets one attribute of the optimizer, when it is made and at each `step()`.

    The optimizer reads the attribute at each of its own steps: the step is billed with the very number it is taken
    with. Change it between logical steps.
    """

    attribute: ClassVar[str]

    def __init__(self, optimizer: Any, *, last_epoch: int = -1) -> None:
        if not hasattr(optimizer, self.attribute):
            raise ValueError(
                f"{type(self).__name__} needs an optimizer with {self.attribute}, got {type(optimizer).__name__}. "
                "Expected the one that make_private returned."
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.step()

    @property
    def current(self) -> float:
        """Returns the number as it is now."""
        value: float = getattr(self.optimizer, self.attribute)
        return value

    def value(self) -> float:
        """Returns the number of the epoch `last_epoch`."""
        raise NotImplementedError

    def step(self) -> None:
        """Begins the next epoch."""
        self.last_epoch += 1
        setattr(self.optimizer, self.attribute, self.value())

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the optimizer and functions, which no checkpoint should hold."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer" and not callable(value)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.__dict__.update(state_dict)


class Exponential(Scheduler):
    """Multiplies the number by `gamma` every epoch."""

    def __init__(self, optimizer: Any, *, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        """Returns the number times `gamma`, and at the beginning the number."""
        return self.current if self.last_epoch == 0 else self.current * self.gamma


class Lambda(Scheduler):
    """Multiplies the number that the optimizer had at the beginning by a function of the epoch."""

    def __init__(self, optimizer: Any, factor: Callable[[int], float], *, last_epoch: int = -1) -> None:
        self._factor = factor
        self._base = getattr(optimizer, self.attribute, 0.0)
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        """Returns the first number times the function of the epoch."""
        return float(self._base * self._factor(self.last_epoch))


class Step(Scheduler):
    """Multiplies the number by `gamma` every `step_size` epochs."""

    def __init__(self, optimizer: Any, *, step_size: int, gamma: float, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch=last_epoch)

    def value(self) -> float:
        """Returns the number, times `gamma` at each multiple of `step_size`."""
        due = self.last_epoch > 0 and self.last_epoch % self.step_size == 0
        return self.current * self.gamma if due else self.current
