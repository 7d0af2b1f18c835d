"""The loss of each example, recomputed from a transformers model's outputs, in place of the one that it reduces itself.

A model that is given `labels` returns one number for the batch, in which one example may rescale the others: a mean
over the tokens of all examples divides each example's loss by the tokens of the others. So the model is called without
labels, and the loss is computed here for each example alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from privet.errors import ConfigurationError, UnsupportedModelError
from privet.integrations.huggingface.families import FAMILIES, Family, bare_model
from privet.integrations.huggingface.registered import registered_for

__all__ = ["family_of", "loss_per_example", "model_inputs", "per_example_loss"]

_ADDRESS = "privet.integrations.huggingface.per_example_loss"
_PAIRS = re.compile(r"CLIP|Clip|Siglip|SigLIP|Align|Clap|DualEncoder|GroupViT|Flava|ColPali|ColQwen")
_NOT_LABELS = ("num_items_in_batch", "return_loss")
_WAY_ON = (
    "Write the loss of each example yourself: register it for the class "
    "(privet.integrations.huggingface.register_loss); or pass a function (outputs, labels, num_items_in_batch) that "
    "returns one number for each example, as PrivateTrainer(compute_loss_func=...), or loss_per_example of PrivateStep."
)


def family_of(model: nn.Module) -> Family:
    """Returns the family of a model.

    Raises:
        UnsupportedModelError: if its loss compares the examples of a batch with each other, or it is of no family that
            is known here.
    """
    base = bare_model(model)
    own = registered_for(base)
    if own is not None:
        return own[1]
    names = [kind.__name__ for kind in type(base).__mro__]
    family = next((each for name in names for each in FAMILIES if each.lists(name)), None)
    if family is None and (any(map(_PAIRS.search, names[:1])) or hasattr(base, "logit_scale")):
        raise UnsupportedModelError(
            f"the loss of {names[0]} is contrastive: it compares every pair of examples inside a batch, so that an "
            "example is in the losses of all others, and no clipping bounds what one of them can do. Expected a loss "
            f"of one example alone, such as that of a classifier over fixed classes. {_WAY_ON}"
        )
    if family is None:
        known = ", ".join(each.words for each in FAMILIES)
        raise UnsupportedModelError(
            f"{_ADDRESS} does not know the loss of {names[0]}. Expected a model with a head for one of these: {known}. "
            f"{_WAY_ON}"
        )
    config = getattr(base, "config", None)
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{names[0]} adds a load-balancing loss to its own (output_router_logits=True), which compares the routing "
            "of all examples of a batch. Expected the loss of each example alone. Set "
            "model.config.output_router_logits = False."
        )
    return family


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what to call a model with in training: the batch without its labels.

    A decoder that reads the labels shifted by one place gets them as `decoder_input_ids`, made by the model's own rule.

    Raises:
        UnsupportedModelError: as `per_example_loss` does.
    """
    family = family_of(model)
    inputs = {key: value for key, value in batch.items() if key not in (*family.labels, *_NOT_LABELS)}
    given = inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None
    if family.decodes and not given:
        base: Any = bare_model(model)
        labels = batch.get("labels")
        if labels is None or not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            raise ConfigurationError(
                f"{type(base).__name__} needs decoder_input_ids, and they cannot be made: "
                f"{'the batch has no labels' if labels is None else 'it has no rule to make them of labels'}. "
                "Expected them in the batch. Let the collator add them, as DataCollatorForSeq2Seq(model=model) does."
            )
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs


def per_example_loss(
    model: nn.Module, outputs: Any, batch: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> Tensor:  # (B,)
    """Returns the loss of each example of a batch, from what the model returned for it without its labels.

    For a batch of one example it is the loss that the model itself computes. The unit of privacy is one row of the
    batch: for language models one sequence, which is a document only where each document is one row.

    Args:
        model: a transformers model with a head, with or without PEFT's adapters.
        outputs: what it returned for `model_inputs(model, batch)`.
        batch: the batch, with its labels.
        label_smoothing: the share of the loss that is spread over all classes, where the loss is a cross entropy.

    Raises:
        UnsupportedModelError: if the model's loss compares examples with each other, or is not known here.
        ConfigurationError: if the batch lacks labels.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1, n_positions=16))
        >>> tokens = torch.randint(32, (4, 10))
        >>> batch = {"input_ids": tokens, "labels": tokens}
        >>> per_example_loss(model, model(**model_inputs(model, batch)), batch).shape
        torch.Size([4])
    """
    family = family_of(model)
    base = bare_model(model)
    needed = [name for name in family.labels if name != "shift_labels"]
    missing = [name for name in needed if batch.get(name) is None]
    if missing and batch.get("shift_labels") is None:
        raise ConfigurationError(
            f"the batch has no {' and no '.join(missing)}, from which the loss of {family.words} is computed; it has "
            f"{', '.join(batch)}. Expected them beside the inputs. Let the dataset or the collator add them."
        )

    def output(name: str) -> Tensor:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if found is None and isinstance(outputs, tuple):
            found = outputs[1 if name == "end_logits" else 0]
        if not isinstance(found, Tensor):
            raise UnsupportedModelError(
                f"{type(base).__name__} returned no {name}, from which the loss of {family.words} is computed. "
                f"{_WAY_ON}"
            )
        return found

    own = registered_for(base)
    if own is not None:
        return own[0](base, outputs, batch)
    return family.loss(base, output, batch, label_smoothing)


def loss_per_example(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:  # (B,)
    """Returns the loss of each example: what `PrivateStep` takes as `loss_per_example`.

    It calls the model on `model_inputs(model, batch)`, and returns `per_example_loss` of what comes out.
    """
    return per_example_loss(model, model(**model_inputs(model, batch)), batch)
