"""The check of a batch: where the examples are, and that what was captured is all there is.

It runs the model on two sizes of the batch to learn the layouts, and then compares captured gradients with autograd's
own (`comparison.py`). All of this happens with the parameters moved a little, so that a gate of zero hides nothing.

The gradients are compared and dropped. Nothing is stored in `p.grad`, and nothing is released. Only the first examples
of the batch are looked at, so the check needs little time, and less memory than the step that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.cut import first_examples
from privet.batches.flat import Bags, rearranged_bags
from privet.batches.grow import detached, grown, left_out, refuse_read_once
from privet.batches.kept import opened
from privet.batches.structure import REGISTER
from privet.errors import CoverageError, PrivetError, UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.comparison import Comparison
from privet.gradients.capture.known_moves import KnownMoves, MovesMet
from privet.gradients.capture.orders import learn_orders
from privet.gradients.capture.other_values import perturbed
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.capture.undisturbed import undisturbed
from privet.gradients.layout import Layouts, Told, Trace
from privet.gradients.rules.strategy import prefers_channels_last
from privet.gradients.spread import HERE, Spread
from privet.gradients.use import Recorded

__all__ = ["FlatError", "GrowthError", "UnsettledError", "check_coverage", "learn_layouts"]

_ATTEMPTS = 8
_ORDERS = 3
"""How often orders of rows are looked for: those of what comes after a wrong one are seen when it is right."""
_EXAMPLES = 16
"""How many examples are looked at. They are enough to reach parts that see few examples, such as experts."""


class FlatError(UnsupportedModelError):
    """The model looks up bags of the inputs that lie in one row, which have to be rearranged before they are grown."""

    def __init__(self, given: Any, bags: Sequence[Bags]) -> None:
        super().__init__(
            "the model looks up bags that lie in one row, cut by offsets. Expected one bag for each example. Give "
            "embedding_bag ids (B, L), padded."
        )
        self.given = given
        self.bags = bags


class UnsettledError(UnsupportedModelError):
    """What was learned of one size of the batch does not go with what was learned of the other one."""


class GrowthError(UnsupportedModelError):
    """The model runs on a batch, and not on the batch with one example more."""


def check_coverage(
    module: nn.Module,
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    *,
    tripwires: Tripwires,
    examples: int,
    batch_axis: int = 0,
    whole: bool = False,
    spread: Spread = HERE,
    on_held: Callable[[int], None] = lambda held: None,
) -> bool:
    """Learns the layouts, checks that capture covers the model, and returns whether the check was conclusive.

    The check is not conclusive if some gradients are not finite, as when one example is NaN. Then the next batch has to
    be checked.

    Args:
        module: the model. Its buffers and random numbers are put back after each run.
        capture: learns the layouts. It must not be in use.
        run: returns the model's differentiable outputs for some inputs, with the examples on `batch_axis`.
        inputs: the inputs of the first batch. No gradient reaches them.
        tripwires: are kept quiet while autograd's own gradients are formed.
        examples: the number of examples in the inputs, at least 1.
        batch_axis: the axis of the inputs that the examples are on, 0 or 1.
        whole: whether all examples are looked at. Then what was learned of this batch is told to the forwards that the
            capture begins from now on, until it is told something else.
        spread: the processes that hold the module together.
        on_held: gets how many bytes the backward of one example keeps until the norms are known.

    Raises:
        UnsupportedModelError: if the batch axis cannot be told somewhere.
        CoverageError: if what was captured is not what autograd finds, with the parameters by name; also if an
            example's gradient depends on the other examples.
    """
    refuse_read_once(inputs)
    inputs = detached(inputs)
    parts = [(inputs, examples)]
    if examples > _EXAMPLES and not whole:
        parts.insert(0, (first_examples(inputs, _EXAMPLES, examples=examples, axis=batch_axis), _EXAMPLES))
    # What is told of this very batch has to hold for its forward, which may move rows by what the parameters say.
    values = (_as_they_are,) if whole else (perturbed, _as_they_are)
    ways = [(some, count, moved) for some, count in parts for moved in values]
    for place, (some, count, moved) in enumerate(ways):
        known = capture.knowledge()
        try:
            with moved(module), undisturbed(module) as restore, torch.enable_grad():
                capture.prefer_channels_last(prefers_channels_last(module))
                how: dict[str, Any] = {"examples": count, "batch_axis": batch_axis, "restore": restore}
                comparison = Comparison(
                    module, capture, run, tripwires=tripwires, restore=restore, batch_axis=batch_axis, spread=spread
                )
                conclusive = _compared(comparison, capture, run, some, known, how)
                on_held(comparison.held)
                return conclusive
        except PrivetError:
            raise
        except Exception:
            # Some models need the whole batch, or parameters that keep a bound, and raise errors of their own. What the
            # part taught is forgotten, and the next way is tried; a real mistake is raised again from the last one.
            if place == len(ways) - 1:
                raise
            capture.release()
            capture.forget_since(known)
        finally:
            capture.release()
            if not whole:
                capture.tell(None)
    raise AssertionError("the last way returns or raises")


def _learned(capture: Capture, run: Callable[[Any], Sequence[Tensor]], inputs: Any, **how: Any) -> Told:
    """Returns what was learned of the inputs; see `learn_layouts`."""
    try:
        return learn_layouts(capture, run, inputs, **how)
    except RuntimeError:
        if not capture.channels_last:
            raise
        # The model may use `view` where it needs the channels outside, for example.
        capture.prefer_channels_last(False)
        return learn_layouts(capture, run, inputs, **how)


def _compared(  # noqa: PLR0917 - what a check needs
    comparison: Comparison,
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    known: tuple[Layouts, KnownMoves],
    how: Mapping[str, Any],
) -> bool:
    """Learns the layouts, tells them to the capture, and returns whether all gradients could be compared.

    Where that fails, it is done anew once the order of the rows was looked at.
    """
    taught: list[Callable[[], None]] = []
    while True:
        try:
            capture.tell(_learned(capture, run, inputs, **how))
            return comparison.check(inputs, how["examples"])
        except (CoverageError, UnsettledError):
            capture.release()
            capture.tell(None)
            found = learn_orders(capture, run, inputs, **how) if len(taught) < _ORDERS else None
            if found is None:
                raise
            taught.append(found)
            capture.forget_since(known)
            for teach in taught:
                teach()


@contextmanager
def _as_they_are(module: nn.Module) -> Iterator[None]:
    """Leaves the parameters where they are."""
    yield


def learn_layouts(
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    *,
    examples: int,
    batch_axis: int = 0,
    restore: Callable[[], None] = lambda: None,
) -> Told:
    """Runs the model on B and on B + 1 examples until the capture knows the batch axis of every operation.

    Returns what was learned of these inputs, in the order in which a forward meets it.

    A wrong guess at one operation changes what is met after it. So both sizes are run until no guess was wrong.

    Args:
        capture: keeps the layouts; it must not be in use.
        run: returns the model's differentiable outputs for some inputs.
        inputs: B examples.
        examples: B, at least 1.
        batch_axis: the axis of the inputs that the examples are on, 0 or 1.
        restore: called before each run, to put buffers and random numbers back.

    Raises:
        UnsupportedModelError: if the batch axis cannot be told somewhere.
    """
    larger = grown(inputs, examples=examples, axis=batch_axis)
    sizes = examples, examples + 1
    tolds: tuple[Told | None, Told | None] = (None, None)
    for _ in range(_ATTEMPTS):
        before = capture.layouts.learned
        traces: list[Trace] = []
        moves: list[MovesMet] = []
        failures = []
        for some, count, known in zip((inputs, larger), sizes, tolds, strict=True):
            trace: Trace = []
            traces.append(trace)
            restore()
            moves.append(MovesMet(*moves))
            capture.tell(known)
            capture.begin(count, Recorded(examples=count), trace=trace, moves=moves[-1], inputs=opened(some))
            try:
                run(some)
            except Exception as error:  # noqa: BLE001 - a wrong guess may be the cause: what was met before it mends the guess
                failures.append((count, error))
            finally:
                capture.release()
                capture.tell(None)
            if moves[-1].bags and rearranged_bags(inputs, inputs, moves[-1].bags, examples=examples) is not None:
                raise FlatError(inputs, moves[-1].bags)
        settled, told, told_larger = capture.layouts.learn(traces[0], traces[1], *sizes)
        placed = capture.moved.known.learn(moves[0], moves[1], sizes, whole=not failures)
        if settled and placed and not failures:
            return told
        tolds = (told, told_larger)
        if (
            failures and placed and capture.layouts.learned == before
        ):  # nothing new was learned: the failure is not a guess's
            raise _explained(*failures[0], inputs=inputs, examples=examples, axis=batch_axis)
    raise UnsettledError(
        f"the model uses its parameters differently for {examples} and for {examples + 1} examples, so that the batch "
        "axis cannot be told. Expected the same operations whatever the size of the batch."
    )


def _explained(count: int, error: Exception, *, inputs: Any, examples: int, axis: int) -> Exception:
    if count == examples or isinstance(error, PrivetError):
        return error
    closed = left_out(inputs, examples)
    hint = (
        f" Left as they were: {'; '.join(closed)}. A tuple of numbers is taken for a shape. {REGISTER}"
        if closed
        else ""
    )
    explained = GrowthError(
        f"the model runs on {examples} examples and not on {count}: {error} To find the batch axis, the first batch is "
        f"run with one example more, in every input with {examples} on axis {axis}. Give the model inputs whose batch "
        f"axis is there, and no other input of that size there.{hint}"
    )
    explained.__cause__ = error  # memory may have run out: a smaller batch is the cure then
    return explained
