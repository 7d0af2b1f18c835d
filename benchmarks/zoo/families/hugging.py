"""Models of transformers from their classes' names, with configurations that are tiny and else their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, classified, ids, pair, tokens

__all__ = ["LAYERS", "built", "causal", "classifier", "config_of", "of_logits", "seq2seq", "text"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def text(s: Size, **more: Any) -> dict[str, Any]:
    """Returns what most configurations of text models call their sizes; what is None is left away."""
    usual = {
        "vocab_size": s.words,
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": 2 * s.width,
        "max_position_embeddings": 2 * s.positions + 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": CLASSES,
    }
    return {name: value for name, value in (usual | more).items() if value is not None}


LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def config_of(name: str, settings: dict[str, Any]) -> Any:
    """Returns a configuration of this class."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return getattr(transformers, name)(**settings)


def built(config: str, model: str, settings: Callable[[Size], dict[str, Any]]) -> Callable[[Size], nn.Module]:
    """Returns a builder of a model's class from a configuration's class and its settings."""

    def build(s: Size) -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(config_of(config, settings(s)))
        return made

    return build


def of_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the cross entropy of a classifier of tokens."""
    return classified(model(input_ids=batch[0]).logits, batch[1])


def _language(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch[0], use_cache=False).logits
    logits = logits[:, -batch[0].shape[1] :]  # prompts come in front
    return classified(logits[:, :-1], batch[0][:, 1:])


def _masked(model: nn.Module, batch: Batch) -> Tensor:
    return classified(model(input_ids=batch[0]).logits, batch[1])


def _translated(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch[0], decoder_input_ids=batch[1], use_cache=False).logits
    return classified(logits, batch[1])


def causal(kind: str, *, name: str = "", head: str = "ForCausalLM", config: str = "", **more: Any) -> Case:
    """Returns the case of a causal language model; `more` are settings of its configuration."""
    facts = {k: more.pop(k) for k in ("note", "refused", "double") if k in more}
    build = built(config or f"{kind}Config", kind + head, lambda s: text(s, **more))
    return Case(name or kind, build, ids, _language, **facts)


def classifier(kind: str, *, name: str = "", head: str = "ForSequenceClassification", **more: Any) -> Case:
    """Returns the case of an encoder with a head that classifies each text."""
    facts = {k: more.pop(k) for k in ("note", "refused", "double") if k in more}
    build = built(f"{kind}Config", kind + head, lambda s: text(s, **more))
    return Case(name or kind, build, tokens, of_logits, **facts)


def masked(kind: str, *, name: str = "", head: str = "ForMaskedLM", **more: Any) -> Case:
    """Returns the case of a masked language model, whose output embedding is the input's own."""
    build = built(f"{kind}Config", kind + head, lambda s: text(s, **more))
    return Case(name or f"{kind} {head[3:]}", build, pair, _masked)


def seq2seq(
    kind: str, *, name: str = "", head: str = "ForConditionalGeneration", config: str = "", **more: Any
) -> Case:
    """Returns the case of an encoder and a decoder of text."""
    facts = {k: more.pop(k) for k in ("note", "refused", "double") if k in more}
    build = built(config or f"{kind}Config", kind + head, lambda s: text(s, **more))
    return Case(name or kind, build, pair, _translated, **facts)
