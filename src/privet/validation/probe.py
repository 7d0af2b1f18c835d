"""Does the output for one example depend on the others? Asked of the model itself, by running it.

The classes of a model's parts do not show a forward that mixes examples (`h - h.mean(0)`), and a comparison of gradient
sums cannot: the captured rows then still add up to the whole gradient, only no row belongs to one example. So the probe
runs the model twice on the first example, once beside the others and once beside copies of itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from privet.batches.count import count_examples
from privet.batches.grow import copies_of_first
from privet.batches.leaves import cut, shows
from privet.batches.structure import Arguments
from privet.batches.tree import paths_in, tensors_in
from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.capture.undisturbed import undisturbed

__all__ = ["find_mixing", "refuse_mixing"]


def _first_rows(output: object, batch: int, axis: int) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in paths_in(output, "output"):
        if isinstance(leaf, Tensor | PackedSequence) and shows(leaf, batch, axis):
            (row,) = tensors_in(cut(leaf, 0, 1, axis))
            yield path, row.detach()


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return not torch.equal(a, b)
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return not torch.equal(a.isfinite(), b.isfinite())
    return bool((a - b).abs().max() > tolerance * (1e-30 + a.abs().max())) if a.numel() else False


def find_mixing(
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object] | None = None,
    *,
    batch_axis: int = 0,
    tolerance: float | None = None,
) -> list[str]:
    """Returns the outputs whose first row depends on the other rows, and the buffers that learn from the data.

    The batch is axis `batch_axis` of every tensor that is as long there as the first tensor argument. It needs two
    examples that differ. Both runs use the same random numbers (dropout), take place in the module's own mode
    without gradients, and leave its buffers and torch's global generators as they were.

    Guarantees: none that nothing mixes. What it names does mix; a model that mixes only for some inputs, or by less
    than `tolerance` (relative; by default 1e-3 for half precision, 1e-4 otherwise), goes unseen.
    """
    kwargs = dict(kwargs or {})
    batch = count_examples(Arguments(args, kwargs), batch_axis, name="the arguments")
    if batch < 2:
        raise ConfigurationError(f"find_mixing compares examples and needs a batch of at least 2, got {batch}.")
    if tolerance is None:
        half = any(p.dtype in {torch.float16, torch.bfloat16} for p in module.parameters())
        tolerance = 1e-3 if half else 1e-4

    outputs: list[object] = []
    buffers: list[dict[str, Tensor]] = []
    alone = copies_of_first(Arguments(args, kwargs), examples=batch, axis=batch_axis)
    with undisturbed(module) as restore, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # reentrant checkpoints
        for positional, named in ((args, kwargs), alone):
            restore()
            outputs.append(module(*positional, **named))
            buffers.append({name: buffer.clone() for name, buffer in module.named_buffers()})
    mixed = [
        f"{name}: its row for one example depends on the other examples of the batch"
        for (name, beside_others), (_, beside_itself) in zip(
            _first_rows(outputs[0], batch, batch_axis), _first_rows(outputs[1], batch, batch_axis), strict=True
        )
        if _differ(beside_others, beside_itself, tolerance)
    ]
    learned = [
        f"buffer {name}: it is written from the data, without noise"
        for name in buffers[0]
        if name not in buffers[1] or _differ(buffers[0][name], buffers[1][name], 0.0)
    ]
    return mixed + learned


def refuse_mixing(
    module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], *, batch_axis: int = 0
) -> None:
    """Raises if an example's output depends on the other examples of its batch."""
    mixed = find_mixing(module, args, kwargs, batch_axis=batch_axis)
    if mixed:
        raise UnsupportedModelError(
            "examples are mixed inside the model: " + "; ".join(mixed) + ". Expected each row to depend on its own "
            "example alone. Take statistics over each example, not over the batch, and keep none in buffers."
        )
