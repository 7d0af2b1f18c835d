"""How a model is spread over processes, as forwards and sums see it; and the model that is whole in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol, final

from torch import nn

from privet.gradients.summation import DictSink, SumSink

__all__ = ["HERE", "Here", "Spread", "is_part", "put_into_parts"]


def is_part(t: object) -> bool:
    """Returns whether a tensor is one of which each process holds a part."""
    return any(kind.__name__ == "DTensor" for kind in type(t).__mro__)


def put_into_parts(module: nn.Module) -> None:
    """Puts gathered parameters back into parts, so that a module holds the same objects before and after a forward."""
    for child in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(child).__mro__):
            child.reshard()  # type: ignore[operator]


class Spread(Protocol):
    """All that captures and sums ask of the processes that hold a model together.

    Where parameters are gathered from all ranks before a module runs, every forward and every backward needs all ranks.
    So nothing that one rank alone knows may decide how many there are.
    """

    @property
    def gathering(self) -> Sequence[nn.Module]:
        """Returns the modules that put gathered parameters in place of their own just before they run."""

    @property
    def collective(self) -> bool:
        """Returns whether every forward needs all ranks."""

    def most(self, own: int) -> int:
        """Returns the largest number that a rank gives, if all ranks have to do the same; else the own number."""

    def looked_at(self, inputs: Any, examples: int, *, due: bool) -> tuple[Any, int] | None:
        """Returns the batch that is checked now, with its number of examples, or None if none is.

        Args:
            inputs: the batch at hand.
            examples: how many examples it has.
            due: whether this process wants it checked. Where forwards are collective, all ranks check one batch.
        """

    def in_turn(self, inputs: Any, examples: int, *, due: bool) -> Iterator[tuple[Any, int, bool]]:
        """Yields, one after the other, the batches that some process wants looked at, and whether each is the own."""

    def sink(self, names: Sequence[str]) -> SumSink:
        """Returns what takes the sums of these parameters, which are expected to come in about this order."""


@final
class Here:
    """The whole model is in this process."""

    gathering: Sequence[nn.Module] = ()
    collective: bool = False

    def most(self, own: int) -> int:
        """Returns the number."""
        return own

    def looked_at(self, inputs: Any, examples: int, *, due: bool) -> tuple[Any, int] | None:
        """Returns the batch at hand if it is due."""
        return (inputs, examples) if due else None

    def in_turn(self, inputs: Any, examples: int, *, due: bool) -> Iterator[tuple[Any, int, bool]]:
        """Yields the batch at hand if it is due."""
        if due:
            yield inputs, examples, True

    def sink(self, names: Sequence[str]) -> SumSink:
        """Returns a sink that keeps all sums."""
        return DictSink()


HERE: Final = Here()
