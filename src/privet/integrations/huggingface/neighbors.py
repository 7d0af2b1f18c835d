"""Does the loss of an example depend on the others of its batch, by the way in which a collator pads them?

A collator pads a batch to its longest example. A model that sees padding, because there is no attention mask, or
because its positions are counted from padding on the left, then gives an example another loss beside a longer one: who
else was sampled moves its gradient, and clipping bounds that for no one.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from privet.errors import UnsupportedModelError
from privet.integrations.huggingface.losses import loss_per_example

__all__ = ["evaluated", "refuse_neighbors"]

_LOOKED_AT = 32  # records, spread over the dataset, among which a short and a long one are sought
_COPIED = 50_000_000
"""Parameters up to which a model is copied in double precision, in which even random weights show what they see."""
_RELATIVE = {torch.float64: 1e-7, torch.float32: 1e-4}
_RELATIVE_IN_HALF = 0.02

Collate = Callable[[list[Any]], Any]


def refuse_neighbors(model: nn.Module, dataset: Any, collate: Collate) -> bool:
    """Returns whether it could look: whether records differ in length, and the collator draws nothing at random.

    Args:
        model: a model of a family whose loss is known.
        dataset: the training data; some records are read.
        collate: makes a batch of records.

    Raises:
        UnsupportedModelError: if the loss of a record changes beside a longer one.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):  # which is refused elsewhere, with the reason
        return False
    places = range(0, len(dataset), -(-len(dataset) // _LOOKED_AT))
    records = [dataset[i] for i in places]
    alone = [_collated(collate, [record]) for record in records]
    sizes = [sum(t.numel() for t in _tensors(batch)) for batch in alone]
    short, long = sizes.index(min(sizes)), sizes.index(max(sizes))
    if sizes[short] == sizes[long] or not _same(alone[short], _collated(collate, [records[short]], seed=1)):
        return False
    together = _collated(collate, [records[short], records[long]])
    looked_at = copy.deepcopy(model).double() if sum(p.numel() for p in model.parameters()) <= _COPIED else model
    parameter = next(looked_at.parameters())
    with evaluated(looked_at):
        first, second = (
            loss_per_example(looked_at, {key: _put(value, parameter) for key, value in batch.items()})[0]
            for batch in (alone[short], together)
        )
    relative = _RELATIVE.get(parameter.dtype, _RELATIVE_IN_HALF)
    if (first - second).abs() > relative * first.abs().clamp(min=1e-3):
        raise UnsupportedModelError(
            "the loss of an example depends on how long the others of its batch are: it is another one beside record "
            f"{places[long]} of the dataset, to whose length the collator pads it. No clipping bounds what a long "
            "example then does to the gradients of all others. Expected padding that the model does not see. Give it "
            "the attention_mask, pad on the right (tokenizer.padding_side = 'right'), or pad all records to one length "
            "(padding='max_length')."
        )
    return True


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A context without dropout, gradients or a trace in the model's modes."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _collated(collate: Collate, records: list[Any], *, seed: int = 0) -> Mapping[str, Any]:
    """Returns a batch; what the collator draws begins from the seed, and nobody else notices."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            batch: Mapping[str, Any] = collate(copy.deepcopy(records))  # some collators change what they are given
            return batch
    finally:
        random.setstate(state)


def _put(value: Any, like: Tensor) -> Any:
    """Returns a tensor on the device, and if it has fractions in the format, of a parameter."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=True))
