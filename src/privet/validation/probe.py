"""Does the output for one example depend on the others? Asked of the model itself, by running it.

The classes of a model's parts do not show a forward that mixes examples (`h - h.mean(0)`), and a comparison of gradient
sums shows it only where a gradient passes. So the probe runs the model again and again: with some examples replaced and
the others in their place, with one example more, and a second time with the same. An example that was not replaced has
to have the same output, and the model has to write the same state.

Gradients are enabled, since models branch on that; the parameters are moved a little, since a gate may be closed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from privet.batches.count import count_examples
from privet.batches.cut import first_examples
from privet.batches.grow import detached, grown
from privet.batches.leaves import cut, shows
from privet.batches.replace import nearest, rearranged
from privet.batches.structure import Arguments
from privet.batches.tree import paths_in, tensors_in
from privet.errors import ConfigurationError, PrivetError, UnsupportedModelError
from privet.gradients.capture.drawn import NothingDropped, packs
from privet.gradients.capture.other_values import in_double, perturbed, to_double
from privet.gradients.capture.state import State, same
from privet.gradients.capture.undisturbed import evaluating, generators, undisturbed
from privet.validation.idioms import idiom_of
from privet.validation.separation import replacements, sources_of

__all__ = ["find_mixing", "refuse_mixing"]

_EXAMPLES = 8
"""How many examples the doors look at, in some ten runs."""
_FACTORS = (1.0, 10.0, 0.0)
"""What floating-point inputs of replaced examples are multiplied by, in turn: some thresholds move only then."""
_OTHERS = "its row for one example depends on the other examples of the batch"
_COUNT = "its row for one example depends on how many examples the batch has"
_MEMORY = "it depends on the batches before, so the model remembers examples, or draws by itself"


def find_mixing(
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object] | None = None,
    *,
    batch_axis: int = 0,
    tolerance: float | None = None,
) -> list[str]:
    """Returns the outputs in which an example's row depends on other rows, and the state that learns from the data.

    The batch is axis `batch_axis` of every tensor that is as long there as the first tensor argument. It needs two
    examples that differ. For every two examples there is a run in which one is replaced and the other is not. All runs
    use the same random numbers (dropout), take place in the module's own mode with gradients enabled and the trainable
    parameters moved by about one percent, and leave its state and torch's global generators as they were.

    Guarantees: none that nothing mixes. What it names does mix; a model that mixes only for some inputs, or by less
    than `tolerance` (relative; by default 1e-3 for half precision, 1e-4 otherwise), goes unseen. What differs by more
    is run again in double precision, so that rounding is not named.

    Example:
        >>> import torch
        >>> from privet.validation import find_mixing
        >>> find_mixing(torch.nn.BatchNorm1d(4, affine=False, track_running_stats=False), (torch.randn(5, 4),))
        ['output: its row for one example depends on the other examples of the batch']
    """
    inputs = detached(Arguments(args, dict(kwargs or {})))
    batch = count_examples(inputs, batch_axis, name="the arguments")
    if batch < 2:
        raise ConfigurationError(f"find_mixing compares examples and needs a batch of at least 2, got {batch}.")
    if tolerance is None:
        half = any(p.dtype in {torch.float16, torch.bfloat16} for p in module.parameters())
        tolerance = 1e-3 if half else 1e-4
    try:
        with perturbed(module):
            return _confirmed(module, inputs, batch, batch_axis, tolerance)
    except PrivetError:
        raise
    except Exception:  # noqa: BLE001 - the model may want parameters inside of bounds; a real mistake is raised again
        return _confirmed(module, inputs, batch, batch_axis, tolerance)


def refuse_mixing(
    module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], *, batch_axis: int = 0
) -> None:
    """Raises an UnsupportedModelError if one of the first 8 examples' outputs depends on the others, or state does."""
    inputs = Arguments(args, dict(kwargs))
    batch = count_examples(inputs, batch_axis, name="the arguments")
    mixed: list[str] | None = None
    if batch > _EXAMPLES:
        part = first_examples(inputs, _EXAMPLES, examples=batch, axis=batch_axis)
        try:
            mixed = find_mixing(module, part.args, part.kwargs, batch_axis=batch_axis)
        except PrivetError:
            raise
        except Exception:  # noqa: BLE001 - some models need the whole batch
            mixed = None
    if mixed is None:
        mixed = find_mixing(module, args, kwargs, batch_axis=batch_axis)
    if mixed:
        raise UnsupportedModelError(
            f"examples are mixed inside the model: {'; '.join(mixed)}. Expected each row to depend on its own "
            f"example alone, and no state to depend on the data. {idiom_of(module, mixed, batch_axis=batch_axis)}"
        )


@dataclass(frozen=True)
class _Run:
    """What one forward returned or left as terms of a loss, by path, and the state that it wrote."""

    outputs: Mapping[str, Any]
    written: Mapping[str, Any]


# -- the runs ----------------------------------------------------------------------------------------------------------


def _confirmed(module: nn.Module, inputs: Arguments, batch: int, axis: int, tolerance: float) -> list[str]:
    """Returns what one look finds, and a second one in double precision does not take for rounding."""
    found = _look(module, inputs, batch, axis, tolerance)
    if not found:
        return []
    if _packs(module, inputs) and not _look(module, inputs, batch, axis, tolerance, lengths_stay=True):
        with NothingDropped():
            found = _look(module, inputs, batch, axis, tolerance)
            return found and _in_double(module, inputs, batch, axis, tolerance, found)
    return _in_double(module, inputs, batch, axis, tolerance, found)


def _packs(module: nn.Module, inputs: Arguments) -> bool:
    with undisturbed(module), torch.enable_grad():
        return packs(lambda: module(*inputs.args, **inputs.kwargs))


def _in_double(  # noqa: PLR0917
    module: nn.Module, inputs: Arguments, batch: int, axis: int, tolerance: float, found: list[str]
) -> list[str]:
    """Returns those of the findings that are no rounding."""
    try:
        with in_double(module):
            again = _look(module, to_double(inputs), batch, axis, 1e-2 * tolerance)
    except Exception:  # noqa: BLE001 - a model that wants one type of number
        again = _look(module, inputs, batch, axis, 10.0 * tolerance)
    return [each for each in found if each in again]


def _look(
    module: nn.Module, inputs: Arguments, batch: int, axis: int, tolerance: float, *, lengths_stay: bool = False
) -> list[str]:
    state, rewind = State(module), generators(module)
    everything = list(range(batch))
    found: dict[str, None] = {}  # in order

    def run(some: Arguments, *, afresh: bool = True, size: int = batch, thorough: bool = False) -> _Run:
        if afresh:
            state.restore()
        rewind()
        output = module(*some.args, **some.kwargs)
        changes = state.changes(thorough=thorough)
        terms = {path: t for path, t in state.terms().items() if path in changes and shows(t, size, axis)}
        outputs = {**dict(_outputs(output, size, axis)), **{f"attribute {path}": t for path, t in terms.items()}}
        return _Run(outputs, {path: value for path, value in changes.items() if path not in terms})

    def compare(one: _Run, two: _Run, rows: list[int], why: str) -> None:
        for path in _differing(one.outputs, two.outputs, rows, axis, tolerance):
            found[f"{path}: {why}"] = None

    with undisturbed(module, state), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # reentrant checkpoints
        base = run(inputs, thorough=True)
        drew = rewind()
        after_itself = run(inputs, afresh=False)
        others = []
        for number, replaced in enumerate(replacements(batch)):
            where = (run, inputs, replaced)
            others.append(_beside_others(*where, number=number, batch=batch, axis=axis, lengths_stay=lengths_stay))
            compare(base, others[-1], [index for index, gone in enumerate(replaced) if not gone], _OTHERS)
        compare(after_itself, run(inputs, afresh=False), everything, _MEMORY)
        if not found:
            with evaluating(module) if drew else nullcontext():  # another size draws other masks
                sizes = _of_both_sizes(run, base if not drew else None, inputs, batch, axis)
                if sizes is not None and not rewind():
                    one, two = sizes  # a weight that is kept as an attribute may be as long as the batch by chance
                    kept = {p: t for p, t in one.outputs.items() if p in two.outputs or not p.startswith("attribute")}
                    compare(_Run(kept, one.written), two, everything, _COUNT)
        written = any(each.written for each in (base, *others))
        again = run(inputs, thorough=True) if written else base
    found |= dict.fromkeys(_learned(module, base.written, [each.written for each in others], again.written))
    return list(found)


def _learned(
    module: nn.Module, base: Mapping[str, Any], others: Sequence[Mapping[str, Any]], again: Mapping[str, Any]
) -> Iterator[str]:
    """Yields the state in which runs on other data left other values."""
    kinds = {name: "parameter" for name, _ in module.named_parameters()}
    kinds |= {name: "buffer" for name, _ in module.named_buffers()}
    for path in dict.fromkeys(path for changes in (base, *others) for path in changes):
        slack = 0.0 if same(base.get(path), again.get(path)) else 1e-5  # it differs between equal runs
        if slack and not isinstance(base.get(path), Tensor):
            continue  # a clock, say
        if not all(same(base.get(path), changes.get(path), tolerance=slack) for changes in others):
            yield f"{kinds.get(path, 'attribute')} {path}: it is written from the data, without noise"


def _beside_others(
    run: Callable[..., _Run],
    inputs: Arguments,
    replaced: list[bool],
    *,
    number: int,
    batch: int,
    axis: int,
    lengths_stay: bool,
) -> _Run:
    """Runs the model with some examples replaced by others, which are also scaled where the model accepts that."""
    factor = _FACTORS[number % len(_FACTORS)]
    factors = [factor if gone else 1.0 for gone in replaced]
    sources = sources_of(replaced, seed=number)
    try:
        return run(rearranged(inputs, sources, examples=batch, axis=axis, factors=factors, lengths_stay=lengths_stay))
    except PrivetError:
        raise
    except Exception:  # noqa: BLE001 - it may want examples in order of length, or numbers within bounds
        return run(rearranged(inputs, nearest(replaced), examples=batch, axis=axis, lengths_stay=lengths_stay))


def _of_both_sizes(
    run: Callable[..., _Run], base: _Run | None, inputs: Arguments, batch: int, axis: int
) -> tuple[_Run, _Run] | None:
    """Returns the outputs for B and for B + 1 examples, or None if the model does not run on both."""
    more = grown(inputs, examples=batch, axis=axis)
    try:
        return run(inputs) if base is None else base, run(more, size=batch + 1)
    except PrivetError:
        raise
    except Exception:  # noqa: BLE001 - the check of layouts says so where it matters
        return None


# -- outputs -----------------------------------------------------------------------------------------------------------


def _outputs(output: object, batch: int, axis: int) -> Iterator[tuple[str, Any]]:
    """Yields what has a row for each example, by path."""
    for path, leaf in paths_in(output, "output"):
        if isinstance(leaf, Tensor):
            if shows(leaf, batch, axis):
                yield path, leaf.detach()
        elif isinstance(leaf, PackedSequence) and shows(leaf, batch, axis):
            yield path, leaf


def _differing(
    one: Mapping[str, Any], two: Mapping[str, Any], rows: list[int], axis: int, tolerance: float
) -> list[str]:
    """Returns the paths of outputs that differ in one of the rows."""
    return [
        path for path, output in one.items() if path not in two or _differ(output, two[path], rows, axis, tolerance)
    ]


def _differ(a: Any, b: Any, rows: list[int], axis: int, tolerance: float) -> bool:
    if isinstance(a, PackedSequence) or isinstance(b, PackedSequence):
        pairs = [(_row(a, row, axis), _row(b, row, axis)) for row in rows]
        return any(_differ_tensors(x.unsqueeze(0), y.unsqueeze(0), tolerance) for x, y in pairs)
    if a.dim() != b.dim():
        return True
    at = torch.tensor(rows, device=a.device)
    a, b = (t.index_select(axis, at).movedim(axis, 0) for t in (a, b))
    return _differ_tensors(a, b, tolerance)


def _row(leaf: Any, row: int, axis: int) -> Tensor:
    (found,) = tensors_in(cut(leaf, row, row + 1, axis))
    return found.detach()


def _common(a: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:  # (R, ...) each
    """Returns what both have, if what one has more is padding: outputs may be as long as the longest of the batch."""
    if a.dim() != b.dim() or a.shape[0] != b.shape[0]:
        return a, b
    for axis in range(1, a.dim()):
        n = min(a.shape[axis], b.shape[axis])
        for t in (a, b):
            more = t.narrow(axis, n, t.shape[axis] - n)
            if more.numel() and _differ_tensors(
                more, more[(*(slice(None),) * axis, slice(-1, None))].expand_as(more), tolerance
            ):
                return a, b
        a, b = a.narrow(axis, 0, n), b.narrow(axis, 0, n)
    return a, b


def _differ_tensors(a: Tensor, b: Tensor, tolerance: float) -> bool:  # (R, ...)
    """Returns whether a row differs by more than `tolerance` of its largest entry, or 1 % of that of the largest."""
    if a.shape != b.shape:
        a, b = _common(a, b, tolerance)
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if a.numel() == 0 or torch.equal(a, b):
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return True
    if not torch.equal(a.isfinite(), b.isfinite()):
        return True
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = (
        t.to(wide).masked_fill(~t.isfinite(), 0.0).flatten(1) if t.dim() > 1 else t.to(wide)[:, None] for t in (a, b)
    )
    sizes = a.abs().amax(1)
    return bool(((a - b).abs().amax(1) > tolerance * (1e-30 + torch.maximum(sizes, 1e-2 * sizes.max()))).any())
