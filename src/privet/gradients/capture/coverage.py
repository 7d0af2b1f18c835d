"""The check on the first batch: where the examples are, and that what was captured is all there is.

It runs the model four more times: twice to learn the layouts (with B and with B + 1 examples), once without capture,
and once under capture. The last two are followed by three backwards, with random output gradients. Two claims are
tested, one for a random half S of the batch and one for the rest: the captured gradients of S add up to autograd's own
gradient of the outputs of S. Three mistakes make the two differ: a use that was missed, rows that were given to the
wrong example, and examples that meet in the backward.

The gradients are compared and dropped. Nothing is stored in `p.grad`, and nothing is released. Only the first examples
of the batch are looked at, so the check needs little time, and less memory than the step that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.cut import first_examples
from privet.batches.grow import detached, grown, left_out, refuse_read_once
from privet.batches.structure import REGISTER
from privet.errors import CoverageError, PrivetError, UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.moved import MovesMet
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.capture.undisturbed import undisturbed
from privet.gradients.layout import Told, Trace
from privet.gradients.rules.strategy import prefers_channels_last
from privet.gradients.summation import weighted_sums
from privet.gradients.use import Recorded

__all__ = ["GrowthError", "check_coverage", "learn_layouts"]

_ATTEMPTS = 8
_EXAMPLES = 16
"""How many examples are looked at. They are enough to reach parts that see few examples, such as experts."""
_HALF = (torch.float16, torch.bfloat16)


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

    Raises:
        UnsupportedModelError: if the batch axis cannot be told somewhere.
        CoverageError: if what was captured is not what autograd finds, with the parameters by name.
    """
    refuse_read_once(inputs)
    inputs = detached(inputs)
    with undisturbed(module) as restore, torch.enable_grad():

        def check(some: Any, count: int) -> bool:
            capture.prefer_channels_last(prefers_channels_last(module))
            try:
                told = learn_layouts(capture, run, some, examples=count, batch_axis=batch_axis, restore=restore)
            except RuntimeError:
                if not capture.channels_last:
                    raise
                # The model may use `view` where it needs the channels outside, for example.
                capture.prefer_channels_last(False)
                told = learn_layouts(capture, run, some, examples=count, batch_axis=batch_axis, restore=restore)
            capture.tell(told)
            return _compare(
                capture, run, some, examples=count, batch_axis=batch_axis, tripwires=tripwires, restore=restore
            )

        try:
            if examples > _EXAMPLES and not whole:
                known = capture.layouts.copy()
                try:
                    return check(first_examples(inputs, _EXAMPLES, examples=examples, axis=batch_axis), _EXAMPLES)
                except PrivetError:
                    raise
                except Exception:  # noqa: BLE001 - whatever a model says of a batch that was cut
                    # Some models need the whole batch, and raise errors of their own on a part. What the part taught
                    # is forgotten, and the whole batch is checked; a real mistake is raised again from there.
                    capture.release()
                    capture.layouts.restore(known)
            return check(inputs, examples)
        finally:
            capture.release()
            if not whole:
                capture.tell(None)


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
    tolds: tuple[Told | None, Told | None] = (None, None)
    for _ in range(_ATTEMPTS):
        before = capture.layouts.learned
        traces: list[Trace] = []
        moves: list[MovesMet] = []
        failures = []
        for some, count, known in zip((inputs, larger), (examples, examples + 1), tolds, strict=True):
            trace: Trace = []
            traces.append(trace)
            restore()
            moves.append(MovesMet(*moves))
            capture.tell(known)
            capture.begin(count, Recorded(examples=count), trace=trace, moves=moves[-1])
            try:
                run(some)
            except Exception as error:  # noqa: BLE001 - a wrong guess may be the cause: what was met before it mends the guess
                failures.append((count, error))
            finally:
                capture.release()
                capture.tell(None)
        settled, told, told_larger = capture.layouts.learn(traces[0], traces[1], examples, examples + 1)
        if settled and not failures:
            capture.moved.known.learn(*moves)
            return told
        tolds = (told, told_larger)
        if failures and capture.layouts.learned == before:  # nothing new was learned: the failure is not a guess's
            raise _explained(*failures[0], inputs=inputs, examples=examples, axis=batch_axis)
    raise UnsupportedModelError(
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


def _compare(
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    *,
    examples: int,
    batch_axis: int,
    tripwires: Tripwires,
    restore: Callable[[], None],
) -> bool:
    """Compares captured gradients with autograd's own, for two halves of the batch; see `_report` for the result."""
    generator = torch.Generator().manual_seed(0)  # no secret: which rows are checked against which
    restore()
    half = torch.zeros(examples)
    half[torch.randperm(examples, generator=generator)[: (examples + 1) // 2]] = 1.0
    parameters = {name: p for name, p in capture.parameters.items() if p.requires_grad}

    outputs = _differentiable(run(inputs))
    draws = [_cotangent(o, generator) for o in outputs]
    found = []
    with tripwires.quiet():
        for weights in (half, 1.0 - half):
            rows = [_weighted(d, weights, batch_axis) for d in draws]
            torch.autograd.backward(outputs, rows, retain_graph=True)
            found.append([p.grad for p in parameters.values()])
            for p in parameters.values():
                p.grad = None
    del outputs  # and the graph, before the captured forward needs as much memory

    recorded = _captured(capture, run, inputs, draws, examples=examples, restore=restore)
    device = next(iter(parameters.values())).device
    sums, sizes = weighted_sums(recorded, parameters, [half.to(device), (1.0 - half).to(device)])
    uses = (use for each in (*recorded.direct.values(), *recorded.derived.values()) for use in each)
    coarse = any(t is not None and t.dtype in _HALF for use in uses for t in (use.gradient, *use.data))
    return _report(parameters, found, sums, sizes, tolerance=5e-2 if coarse else 2e-3)


def _captured(
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    draws: Sequence[Tensor],
    *,
    examples: int,
    restore: Callable[[], None],
) -> Recorded:
    """Runs forward and backward under capture, and returns what was recorded."""
    recorded = Recorded(examples=examples)
    restore()
    capture.begin(examples, recorded)
    outputs = _differentiable(run(inputs))
    capture.end(outputs)
    torch.autograd.backward(outputs, list(draws))
    return recorded


def _differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    found = [o for o in outputs if o.requires_grad]
    if not found:
        raise UnsupportedModelError(
            "no output of the model depends on its trainable parameters. Expected a tensor that needs a gradient, in "
            "a tuple, list, dict or dataclass."
        )
    return found


def _cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(output.shape, generator=generator).to(output)


def _weighted(draw: Tensor, weights: Tensor, axis: int) -> Tensor:
    axis = min(axis, draw.dim() - 1)
    shape = [1] * draw.dim()
    shape[axis] = -1
    return draw * weights.view(shape).to(draw)


def _report(
    parameters: Mapping[str, nn.Parameter],
    found: Sequence[Sequence[Tensor | None]],
    sums: Sequence[Mapping[str, Tensor]],
    sizes: Mapping[str, float],
    *,
    tolerance: float,
) -> bool:
    """Raises if gradients differ, and returns whether all could be compared: those that are not finite cannot."""
    finite = True
    overall = max(sizes.values(), default=0.0)
    wrong = []
    for place, (name, p) in enumerate(parameters.items()):
        for gradients, captured in zip(found, sums, strict=True):
            expected, got = gradients[place], captured.get(name)
            expected = torch.zeros_like(p) if expected is None else expected
            got = torch.zeros_like(p) if got is None else got.view(p.shape)
            # Terms that cancel leave a small sum with a large rounding error: so errors are measured by the terms.
            scale = max(sizes.get(name, 0.0), float(expected.float().norm()), 1e-5 * overall)
            error = float((expected.to(got.dtype) - got).float().norm())
            if not bool(expected.isfinite().all()):
                finite = False
            elif not error <= tolerance * scale:
                kind = "another gradient" if bool(got.any()) else "no gradient"
                wrong.append(f"{name}: {kind} was captured")  # without norms, which tell of private data
                break
    if wrong:
        raise CoverageError(
            "on the first batch, the per-example gradients of half of the examples do not add up to the gradient of "
            "their outputs:\n  " + "\n  ".join(wrong) + "\nEither examples are mixed (a mean over the batch, a "
            "batch axis that is not where it seems), or a parameter is used in a way that was not captured (a custom "
            "autograd Function). Keep examples apart, or register a rule for the operation (privet.register_rule)."
        )
    return finite
