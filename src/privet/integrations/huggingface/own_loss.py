"""Is the loss that is computed for each example the one that the model itself computes? One example tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.errors import UnsupportedModelError
from privet.integrations.huggingface.families import bare_model
from privet.integrations.huggingface.losses import family_of, loss_per_example
from privet.integrations.huggingface.neighbors import evaluated
from privet.integrations.huggingface.registered import registered_for

__all__ = ["refuse_other_loss"]

_RELATIVE = {torch.float16: 0.05, torch.bfloat16: 0.05}
_RELATIVE_OTHERWISE = 1e-3


def refuse_other_loss(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Returns whether another batch need not be looked at. Compares the first example's losses, without dropout.

    Raises:
        UnsupportedModelError: if they differ, as for a model that adds a loss of its own.
    """
    if registered_for(bare_model(model)) is not None:  # its user says what it is
        return True
    labels = batch.get(family_of(model).labels[0])
    if not isinstance(labels, Tensor) or labels.shape[0] == 0:
        return False
    rows = labels.shape[0]
    one = {
        key: value[:1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for key, value in batch.items()
    }
    with evaluated(model):
        own, ours = getattr(model(**one), "loss", None), loss_per_example(model, one)[0]
    if not isinstance(own, Tensor) or own.dim():  # the model computes no loss
        return True
    if not torch.isfinite(own):  # the example has no labels
        return False
    if (own - ours).abs() > _RELATIVE.get(own.dtype, _RELATIVE_OTHERWISE) * own.abs().clamp(min=1e-3):
        raise UnsupportedModelError(
            f"for a batch of one example {type(bare_model(model)).__name__} computes another loss than that of "
            f"{family_of(model).words}. Expected the same. Write the loss of each example yourself: a function "
            "(outputs, labels, num_items_in_batch) that returns one number for each example, as "
            "PrivateTrainer(compute_loss_func=...)."
        )
    return True
