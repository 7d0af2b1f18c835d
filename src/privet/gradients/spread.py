"""How a model is spread over processes, as forwards and sums see it; and the model that is whole in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, final

from torch import Tensor, nn

from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.summation import DictSink, LocalNorms, NormReducer, SumSink, clipped_sum
from privet.gradients.use import Owner, Recorded
from privet.gradients.weights import Policy

__all__ = ["HERE", "Here", "LocalCalls", "Parts", "Spread", "is_part", "put_into_parts", "spread_sum", "sum_of_nobody"]

_P = TypeVar("_P")


def is_part(t: object) -> bool:
    """Returns whether a tensor is one of which each process holds a part."""
    return any(kind.__name__ == "DTensor" for kind in type(t).__mro__)


def put_into_parts(module: nn.Module) -> None:
    """Puts gathered parameters back into parts, so that a module holds the same objects before and after a forward."""
    for child in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(child).__mro__):
            child.reshard()  # type: ignore[operator]


class LocalCalls(Protocol):
    """How an operation on parts becomes operations of this process (implemented by `Capture`)."""

    def local(self, value: object) -> nn.Parameter | None:
        """Returns the own part of a private parameter, or None for anything else."""

    def name_of(self, local: nn.Parameter) -> str:
        """Returns a parameter's name, for messages."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation of this process, and returns its result."""

    def intercept_shared(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        add_up: Callable[[Tensor], Tensor],
    ) -> Any:
        """Does the same where examples are spread over processes: their gradients (R, *shape) are added up by `add_up`.

        All of these processes have to record the same operations in the same order.
        """


class Parts(Protocol):
    """Operations on parameters of which each process holds a part, as tensor parallel plans make them."""

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the own part as a parameter in the same memory."""

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], calls: LocalCalls) -> Any:
        """Runs one operation by operations on the own parts, and returns its result.

        Raises:
            UnsupportedModelError: if it is not known what they would be.
        """

    def own(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        """Returns the own part of a parameter's gradient. All processes call it, in the same order."""

    def unlike(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Returns which parameters that are whole everywhere have other gradients elsewhere. All processes call it."""


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

    @property
    def parts(self) -> Parts | None:
        """Returns how operations go on while parameters are in parts, or None if all are whole then."""

    @property
    def norms(self) -> NormReducer:
        """Returns what adds up the squared norms of the parts of examples' gradients."""

    def counted(self, parameters: Mapping[str, _P]) -> Mapping[str, _P]:
        """Returns those of the parameters that this process counts in norms, and sums: each is counted once."""

    def require_alike(self, batch: Sequence[Tensor]) -> None:
        """Raises RanksError on all processes if some that have to see one batch see others."""

    def together(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Returns what all processes found of parameters, by name, where forwards are collective."""

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
    parts: Parts | None = None
    norms: NormReducer = LocalNorms()

    def counted(self, parameters: Mapping[str, _P]) -> Mapping[str, _P]:
        """Returns all of them."""
        return parameters

    def require_alike(self, batch: Sequence[Tensor]) -> None:
        """Does nothing."""

    def together(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Returns what was found here."""
        return own

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


def spread_sum(
    recorded: Recorded,
    parameters: Mapping[str, nn.Parameter],
    policy: Policy,
    spread: Spread,
    *,
    scale: float = 1.0,
    owner: Owner | None = None,
    absent: Tensor | None = None,  # (B,) bool
) -> ClippedSum:
    """Returns the clipped sum of what one backward recorded here and elsewhere; see `summation.clipped_sum`."""
    return clipped_sum(
        recorded,
        spread.counted(parameters),
        policy,
        scale=scale,
        owner=owner,
        absent=absent,
        reducer=spread.norms,
        sink=spread.sink(list(parameters)),
        names=list(parameters),
    )


def sum_of_nobody(parameters: Mapping[str, nn.Parameter], policy: Policy, spread: Spread) -> ClippedSum:
    """Returns the sum of a batch that is empty on all ranks."""
    met = {} if spread.collective else parameters  # gathered parameters may never have been met
    names = list(parameters)
    return clipped_sum(Recorded(examples=0), met, policy, sink=spread.sink(names), names=names)
