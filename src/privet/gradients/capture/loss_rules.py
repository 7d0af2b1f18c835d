"""What a loss must not do: let one example move another one's gradient before any clipping.

The batch axis is followed from the model's outputs through each operation of the loss, as far as its shapes tell. Then
three things are looked for: an operation that takes a statistic over the batch, one in which two examples meet, and a
function that is not linear of something that the batch was added up in. Each rule names what it knows to be wrong. An
operation that it cannot follow is let pass: that no rule speaks is no proof.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from privet.gradients.capture.loss_graph import LossGraph, Operation

__all__ = ["TokenMean", "faults_of", "is_divided", "is_weighted_mean", "token_means"]

_MEAN, _SUM = 1, 2  # torch's numbers for a reduction
_UNUSED_LABEL = -100  # torch's default of ignore_index

_LINEAR = frozenset({
    "Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "View", "UnsafeView", "ReshapeAlias", "ReshapeCopy",
    "Squeeze", "Unsqueeze", "Expand", "Permute", "Transpose", "T", "Select", "Slice", "Clone", "ToCopy", "Alias",
    "Cat", "Stack", "Index", "IndexSelect", "Gather", "MaskedFill", "MaskedSelect", "Where", "Split", "SplitWithSizes",
    "Unbind", "Repeat", "CopySlices", "Copy", "CopyBackwards", "Diagonal", "Mm", "Mv", "Dot", "Bmm", "Addmm", "Cumsum",
    "NanToNum", "AsStrided", "Flip", "Roll", "Trace", "Detach", "MulScalar", "Conj", "Real", "AccumulateGrad",
})  # fmt: skip
_STATISTICS = frozenset({
    "Std", "Var", "StdMean", "VarMean", "LinalgVectorNorm", "Norm", "Logsumexp", "Softmax", "LogSoftmax", "Max", "Min",
    "Amax", "Amin", "Prod", "Median", "Nanmedian", "Mode", "Quantile", "Sort", "Topk", "Kthvalue", "Logcumsumexp",
    "Cummax", "Cummin", "Renorm",
})  # fmt: skip
_JOINS = frozenset({"Cat", "Stack", "CopySlices"})
_PICKS = frozenset({"Slice", "Select", "Index", "IndexSelect", "Roll", "Flip"})
_VIEWS = frozenset({"View", "UnsafeView", "ReshapeAlias", "ReshapeCopy", "Squeeze"})
_LIKELIHOODS = frozenset({"NllLoss", "NllLoss2D"})


@dataclass(frozen=True)
class TokenMean:
    """A mean over the tokens of all examples: how many there are, and among how many classes."""

    tokens: int
    classes: int


def faults_of(
    graph: LossGraph, *, examples: int, axis: int, mean: bool, trusted: Collection[Any] = ()
) -> Iterator[str]:
    """Yields what is wrong with a loss, each with what to do instead.

    Args:
        graph: the loss, down to the outputs.
        examples: how many rows an output has, at least 2.
        axis: where the outputs have them.
        mean: whether the loss is declared a mean over the examples, else a sum.
        trusted: the nodes of losses that were computed for each example alone.
    """
    axes: dict[Operation, int | None] = {}
    mixed: dict[Operation, bool] = {}
    picked: dict[Operation, object] = {}
    for node, end in graph.ends.items():
        at = 0 if node in trusted else axis
        rows = len(end.shape) > at and end.shape[at] == examples
        axes[end], mixed[end], picked[end] = (at if rows else None), False, None
    # Where an output is as wide as the batch is long, (B, B) says nothing.
    distinct = not any(examples in end.shape[1:] for end in graph.ends.values())
    for each in graph.operations:
        fault = _fault(each, axes, examples, may_be_broadcast=distinct) or _not_linear(each, mixed)
        if fault is not None:
            yield fault
            return  # what follows a fault is wrong with it
        axes[each] = _axis_after(each, axes, examples)
        picked[each] = _picked(each, axes, picked)
        met = each.shape != () and each.name not in _JOINS and len({picked[below] for below in each.fed}) > 1
        mixed[each] = met or any(mixed[below] for below in each.fed) or _reduces(each, axes)
    yield from _declared_wrongly(graph, axes, mean=mean)


def is_weighted_mean(each: Operation) -> bool:
    """Returns whether an operation is a mean of likelihoods that divides by the class weights of its labels."""
    return each.name in _LIKELIHOODS and each.option("reduction") == _MEAN and each.option("weight") is not None


def is_divided(graph: LossGraph) -> bool:
    """Returns whether a loss is divided or multiplied by something that the outputs have no part in."""
    return any(each.name in {"Div", "Mul"} and len(each.fed) == 1 for each in graph.operations)


def token_means(graph: LossGraph) -> list[TokenMean]:
    """Returns the means over tokens that a loss takes, whose labels may be left out by `ignore_index`."""
    found = []
    for each in graph.operations:
        if each.name in _LIKELIHOODS and each.option("reduction") == _MEAN:
            shape = each.fed[0].shape
            if len(shape) > 1:
                found.append(TokenMean(math.prod(shape) // shape[1], shape[1]))
    return found


# -- what is wrong with one operation ----------------------------------------------------------------------------------


def _fault(
    each: Operation, axes: Mapping[Operation, int | None], examples: int, *, may_be_broadcast: bool
) -> str | None:
    if each.name in _LIKELIHOODS and each.option("reduction") == _MEAN:
        if is_weighted_mean(each):
            return (
                "it is a mean weighted by class (weight=), which divides by the weights of the whole batch: one "
                "example's class rescales the others. Take reduction='sum' and divide by the number of rows"
            )
        if _signed(each.option("ignore_index", _UNUSED_LABEL)) != _UNUSED_LABEL:
            return (
                "it is a mean over the labels that ignore_index leaves: how many one example leaves rescales the "
                "others. Take the mean of each example's own losses first"
            )
    known = [below for below in each.fed if axes[below] is not None]
    if not known:
        return None
    if each.name in _STATISTICS and any(_over(each, below, axes) for below in known):
        return (
            f"{each.name} is taken over the batch, such as for a norm, a softmax over examples or hard examples chosen "
            "by their losses. Take it over each example alone"
        )
    if each.name in {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"} and each.option("training"):
        return "a batch normalisation mixes the examples. Normalise each example alone"
    if _pairwise(each, axes):
        return (
            "every example meets every other one, as in a contrastive or pairwise loss: no gradient belongs to one "
            "example alone. Make a pair or a group one row of the dataset, or use a loss of one example"
        )
    square = (examples, examples)
    if (
        may_be_broadcast
        and each.shape == square
        and any(
            below.shape in {(examples, 1), (examples,)} and len(below.shape) - (axes[below] or 0) <= 2
            for below in known
        )
    ):
        return (
            f"outputs of shape {known[0].shape} met targets of another shape, and broadcasting made "
            f"{square} of them: each output is compared with the targets of all examples. Give both one shape: "
            "squeeze the outputs, or unsqueeze the targets"
        )
    return None


def _pairwise(each: Operation, axes: Mapping[Operation, int | None]) -> bool:
    """Returns whether two operands have the batch on different axes of the result, or contract it."""
    if each.name == "Pdist":
        return True
    both = [below for below in each.fed if axes[below] is not None]
    if len(both) < 2:
        return False
    if each.name == "Mm" or (each.name == "Cdist" and len(each.shape) == 2):
        return True
    if each.name == "Bmm":
        return any(axes[below] != 0 for below in both)
    if each.name in _JOINS or each.name == "Cdist":
        return False
    places = {len(each.shape) - len(below.shape) + (axes[below] or 0) for below in both}
    return len(places) > 1 and all(len(below.shape) == len(each.shape) for below in both)


def _not_linear(each: Operation, mixed: Mapping[Operation, bool]) -> str | None:
    if not any(mixed[below] for below in each.fed):
        return None
    several = len(each.fed) > 1
    if each.name in _LINEAR and not (several and each.name in {"Mul", "Mm", "Mv", "Dot", "Bmm"}):
        divided = each.name == "Div" and len(each.inputs) > 1 and each.inputs[1] is not None
        if not divided:
            return None
    return (
        f"{each.name} is applied after examples were added up, as for a root of a mean, a ratio of sums or a distance "
        "from the mean of the batch: each example's gradient then depends on the others. Apply it to each example alone"
    )


# -- where the batch is ------------------------------------------------------------------------------------------------


def _over(each: Operation, below: Operation, axes: Mapping[Operation, int | None]) -> bool:
    """Returns whether an operation goes over the batch axis of what it was computed from."""
    dim = each.option("dim")
    if dim is None or dim is ...:
        return each.shape == () and below.shape != ()
    rank = len(below.shape)
    return axes[below] in {_signed(d) % max(rank, 1) for d in (dim if isinstance(dim, tuple | list) else (dim,))}


def _signed(number: int) -> int:
    """Returns a number that torch shows without its sign."""
    return number - 2**64 if number >= 2**63 else number


def _picked(each: Operation, axes: Mapping[Operation, int | None], picked: Mapping[Operation, object]) -> object:
    """Returns which rows of the batch a result holds, and in which order; None for all of them as they are."""
    below = each.fed[0]
    axis = axes[below]
    if each.name in _JOINS or axis is None or each.name not in _PICKS:
        return None if each.name in _JOINS else picked[below]
    if each.name in {"Slice", "Select", "IndexSelect"} and _signed(each.option("dim")) % len(below.shape) != axis:
        return picked[below]
    if each.name in {"Roll", "Flip"} and axis not in {_signed(d) for d in each.option("dims", ())}:
        return picked[below]
    if each.name == "Index" and (axis != 0 or each.shape[1:] != below.shape[1:]):
        return picked[below]  # which may be a choice of columns, such as o[range(B), labels]
    if each.name == "Slice":
        whole = each.shape == below.shape
        return picked[below] if whole else ("Slice", each.option("start"), each.option("end"), each.option("step"))
    return ("Select", each.option("index")) if each.name == "Select" else each


def _reduces(each: Operation, axes: Mapping[Operation, int | None]) -> bool:
    known = [below for below in each.fed if axes[below] is not None]
    if each.shape == ():
        return any(below.shape != () for below in known)
    return each.name in {"Sum", "Mean", "Cumsum"} and any(_over(each, below, axes) for below in known)


def _axis_after(each: Operation, axes: Mapping[Operation, int | None], examples: int) -> int | None:
    """Returns the batch axis of an operation's result, or None if it cannot be told."""
    known = [below for below in each.fed if axes[below] is not None]
    if not known:
        return None
    below = known[0]
    axis, rank = axes[below] or 0, len(below.shape)
    match each.name:
        case "Permute":
            dims = [_signed(d) % rank for d in each.option("dims")]
            return dims.index(axis)
        case "Transpose" | "T":
            first, second = (_signed(each.option(f"dim{i}", i)) % rank for i in (0, 1))
            return {first: second, second: first}.get(axis, axis)
        case "Unsqueeze" | "Stack":
            return axis + (_signed(each.option("dim")) % (rank + 1) <= axis)
        case "Mm" | "Addmm" | "Bmm":
            axis = axis if each.shape[axis : axis + 1] == below.shape[axis : axis + 1] else rank
        case "Sum" | "Mean" if not each.option("keepdim") and each.shape != ():
            if _over(each, below, axes):
                return None
            dim = each.option("dim", ())
            axis -= sum(_signed(d) % rank < axis for d in (dim if isinstance(dim, tuple | list) else (dim,)))
        case "Select" | "Unbind":
            dim = _signed(each.option("dim", 0)) % rank
            if dim == axis:
                return None
            axis -= dim < axis
        case name if name in _VIEWS:
            return _axis_of_view(below.shape, axis, each.shape, examples)
        case _ if len(each.shape) >= rank:
            axis += len(each.shape) - rank
    return axis if len(each.shape) > axis and each.shape[axis] % examples == 0 and each.shape[axis] else None


def _axis_of_view(before: tuple[int, ...], axis: int, after: tuple[int, ...], examples: int) -> int | None:
    """Returns the axis of a view that begins where the batch axis did, or holds it, with other axes merged into it."""
    outside = math.prod(before[:axis])
    for each, size in enumerate(after):
        if size and size % examples == 0 and math.prod(after[:each]) == outside:
            return each
    # Axes in front were merged with it, as for two views of each example that were stacked.
    for each, size in enumerate(after):
        if math.prod(after[:each]) * size == outside * before[axis] and size and size % examples == 0:
            return each
    return None


# -- mean or sum -------------------------------------------------------------------------------------------------------


def _declared_wrongly(graph: LossGraph, axes: Mapping[Operation, int | None], *, mean: bool) -> Iterator[str]:
    """Yields how the loss is put together, where that is plain and is not what was declared."""
    ends: set[Operation] = set()
    stack = [root for root in graph.roots if root.shape == ()]
    if len(stack) != len(graph.roots):
        return
    while stack:  # down through what only adds scalars, to what makes one of a batch
        each = stack.pop()
        if each.name in {"Add", "Sub", "Neg", "ToCopy", "Clone"} and all(below.shape == () for below in each.fed):
            stack += each.fed
        else:
            ends.add(each)
    kinds = {_kind(each, axes) for each in ends}
    if mean and kinds == {"sum"} and not any(_divides(each) for each in graph.operations):
        yield (
            "it is a sum over the examples, and a mean was declared: the size of the batch would rescale every "
            "gradient. Give loss_reduction='sum' to make_private, or take the mean"
        )
    elif not mean and kinds == {"mean"}:
        yield (
            "it is a mean over the examples, and a sum was declared: the size of the batch would rescale every "
            "gradient. Leave loss_reduction='sum' away, or take the sum"
        )


def _kind(each: Operation, axes: Mapping[Operation, int | None]) -> Literal["mean", "sum"] | None:
    if each.shape != () or not any(axes[below] is not None and below.shape != () for below in each.fed):
        return None
    reduction = each.option("reduction")
    if each.name == "Mean" or reduction == _MEAN:
        return "mean"
    return "sum" if each.name == "Sum" or reduction == _SUM else None


def _divides(each: Operation) -> bool:
    return each.name in {"Mul", "Div", "Mean", "Mm", "Mv", "Dot", "Addmm", "Bmm"} or each.option("reduction") == _MEAN
