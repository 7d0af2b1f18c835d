"""What is known of the families of transformers models: their classes, their labels, and the loss of one example.

Legend: B examples, T positions, V words of the vocabulary or classes, C choices.

    family                           loss of one example
    causal language modeling         mean over its own tokens, each predicted from those before it
    masked language modeling         mean over its own masked tokens
    sequence to sequence             mean over its own target tokens
    token classification             mean over its own labeled tokens
    sequence, image, audio, video    cross entropy; for several labels, or a number, the mean over its own
    classification
    multiple choice, next sentence   cross entropy over its own choices
    speech recognition by CTC        over all alignments with its own letters, as config.ctc_loss_reduction says
    question answering               mean of the losses of start and end

A label of -100 is left out, as transformers does. An example that has no label at all has a loss of 0, where
transformers gives NaN. No number of tokens is counted over the batch: it would let one example rescale the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet.accounting.event import Unit
from privet.errors import ConfigurationError
from privet.integrations.huggingface.installed import modeling_auto

__all__ = ["FAMILIES", "IGNORED", "Family", "Outputs", "bare_model"]

IGNORED = -100
"""The label of a token, or of an example, that is left out."""

Outputs = Callable[[str], Tensor]
"""Returns an output of the model by its name."""
Loss = Callable[[Any, Outputs, Mapping[str, Any], float], Tensor]
"""Returns the loss of each example, (B,), from the bare model, its outputs, the batch and the smoothing."""


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        words: what it is called.
        tables: of transformers' auto classes, which list its classes by name.
        labels: the entries of a batch that are its labels.
        loss: the loss of each example.
        unit: what one record is, unless its user says otherwise.
        decodes: whether its decoder reads the labels, shifted by one place.
    """

    words: str
    tables: tuple[str, ...]
    labels: tuple[str, ...]
    loss: Loss
    unit: Unit = Unit.EXAMPLE
    decodes: bool = False

    def lists(self, name: str) -> bool:
        """Returns whether a class of this name is of the family."""
        for table in self.tables:
            for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values():
                if name == names or (isinstance(names, tuple | list) and name in names):
                    return True
        return False


def _wide(logits: Tensor) -> Tensor:
    """Returns logits in a format in which a softmax over many words keeps its digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _mean_over_tokens(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:  # (B, T, V), (B, T) -> (B,)
    labels = labels.to(logits.device)
    losses = F.cross_entropy(
        _wide(logits).flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=smoothing,
    ).view(labels.shape)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _aligned(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    """Returns the mean over an example's tokens, each of which has its label at its own place."""
    return _mean_over_tokens(outputs("logits"), batch["labels"], smoothing)


def _shifted(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    """Returns the mean over an example's tokens, each of which is the label of the place before it."""
    logits = outputs("logits")
    if batch.get("shift_labels") is not None:
        return _mean_over_tokens(logits, batch["shift_labels"], smoothing)
    labels = batch["labels"]
    virtual = logits.shape[1] - labels.shape[1]  # tokens that prompt tuning puts in front
    if virtual > 0:
        labels = F.pad(labels, (virtual, 0), value=IGNORED)
    return _mean_over_tokens(logits[:, :-1], labels[:, 1:], smoothing)


def _classified(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    logits = _wide(outputs("logits"))  # (B, V)
    labels = batch["labels"].to(logits.device)
    kind = getattr(model.config, "problem_type", None)
    if kind is None and model.config.num_labels == 1:
        kind = "regression"
    if kind is None and labels.dtype in (torch.long, torch.int):
        kind = "single_label_classification"
    if smoothing and kind != "single_label_classification":
        raise _no_smoothing(str(kind))
    if kind == "regression":
        apart: Tensor = logits - labels.to(logits.dtype).view(logits.shape)
        return apart.square().mean(1)
    if kind == "single_label_classification":
        return F.cross_entropy(
            logits, labels.view(-1), ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)


def _chosen(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    logits = _wide(outputs("logits"))  # (B, C)
    labels = batch["labels"].to(logits.device).view(-1)
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


def _answered(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    if smoothing:
        raise _no_smoothing("question answering")
    total = None
    for end in ("start", "end"):
        logits = _wide(outputs(f"{end}_logits"))  # (B, T)
        # A place outside of the text is left out, as transformers does.
        places = batch[f"{end}_positions"].to(logits.device).view(-1).clamp(0, logits.shape[1])
        losses = F.cross_entropy(logits, places, ignore_index=logits.shape[1], reduction="none")
        total = losses if total is None else total + losses
    assert total is not None
    return total / 2


def _spelled(model: Any, outputs: Outputs, batch: Mapping[str, Any], smoothing: float) -> Tensor:
    """Returns the loss over all alignments of an example with its own letters, as `config.ctc_loss_reduction` says."""
    if smoothing:
        raise _no_smoothing("speech recognition by CTC")
    logits, config = outputs("logits"), model.config  # (B, T, V)
    labels = batch["labels"].to(logits.device)
    letters = (labels >= 0).sum(1)  # of each example
    places = torch.full_like(letters, logits.shape[1])
    if batch.get("attention_mask") is not None:
        heard = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))  # noqa: SLF001 - no public name
        places = heard.to(letters).clamp(max=logits.shape[1])
    scores = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).transpose(0, 1)
    losses = F.ctc_loss(
        scores,
        labels.clamp(min=0),
        places,
        letters,
        blank=config.pad_token_id,
        reduction="none",
        zero_infinity=config.ctc_zero_infinity,
    )
    return losses / letters.clamp(min=1) if config.ctc_loss_reduction == "mean" else losses


def _no_smoothing(of: str) -> ConfigurationError:
    return ConfigurationError(
        f"label_smoothing_factor is set, and the loss of {of} has no classes to smooth over. Expected 0 for it. Leave "
        "label_smoothing_factor away."
    )


# In the order in which they are asked: some classes are in the tables of several.
FAMILIES = (
    Family(
        "sequence to sequence", ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"), ("labels",), _aligned, Unit.SEQUENCE, True
    ),
    Family("masked language modeling", ("MASKED_LM",), ("labels",), _aligned, Unit.SEQUENCE),
    Family("causal language modeling", ("CAUSAL_LM",), ("labels", "shift_labels"), _shifted, Unit.SEQUENCE),
    Family("token classification", ("TOKEN_CLASSIFICATION",), ("labels",), _aligned),
    Family("question answering", ("QUESTION_ANSWERING",), ("start_positions", "end_positions"), _answered),
    Family("multiple choice", ("MULTIPLE_CHOICE",), ("labels",), _chosen),
    Family("next sentence prediction", ("NEXT_SENTENCE_PREDICTION",), ("labels",), _chosen),
    Family("speech recognition by CTC", ("CTC",), ("labels",), _spelled),
    Family(
        "classification",
        ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION"),
        ("labels",),
        _classified,
    ),
)


def bare_model(model: nn.Module) -> nn.Module:
    """Returns the model of transformers inside of what wraps it: PEFT's adapters, or a data-parallel module."""
    while True:
        outer: Any = model
        inner = outer.get_base_model() if hasattr(outer, "get_base_model") else getattr(outer, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
