"""Adapters of PEFT around models of transformers, and ways to leave parts of a model frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo.case import Case, Size, ids, pair, tokens
from benchmarks.zoo.families import hugging
from benchmarks.zoo.families.hugging import built, text


def _llama(s: Size) -> nn.Module:
    return built("LlamaConfig", "LlamaForCausalLM", lambda s: text(s, num_key_value_heads=2))(s)


def _gpt2(s: Size) -> nn.Module:
    return built("GPT2Config", "GPT2LMHeadModel", text)(s)


def _bert(s: Size) -> nn.Module:
    return built("BertConfig", "BertForSequenceClassification", text)(s)


def _t5(s: Size) -> nn.Module:
    settings = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return built("T5Config", "T5ForConditionalGeneration", lambda s: text(s, **settings))(s)


BASES: dict[str, tuple[Callable[[Size], nn.Module], Any, Any, str, list[str]]] = {
    "Llama": (_llama, ids, hugging._language, "CAUSAL_LM", ["q_proj", "v_proj"]),  # noqa: SLF001 - of this package
    "GPT2": (_gpt2, ids, hugging._language, "CAUSAL_LM", ["c_attn"]),  # noqa: SLF001
    "BERT": (_bert, tokens, hugging.of_logits, "SEQ_CLS", ["query", "value"]),
    "T5": (_t5, pair, hugging._translated, "SEQ_2_SEQ_LM", ["q", "v"]),  # noqa: SLF001
}


def _adapted(kind: str, base: str = "Llama", *, name: str = "", prompts: bool = False, **settings: Any) -> Case:
    make, batch, loss, task, targets = BASES[base]
    facts = {k: settings.pop(k) for k in ("note", "refused") if k in settings}

    def build(s: Size) -> nn.Module:
        import peft

        usual = {} if prompts else {"target_modules": targets}
        config = getattr(peft, f"{kind}Config")(task_type=task, **(usual | settings))
        made: nn.Module = peft.get_peft_model(make(s), config)
        if kind == "AdaLora":
            made.base_model.peft_config["default"].total_step = 100
        for p_name, p in made.named_parameters():  # zeros hide what a test is to see
            if "lora_B" in p_name or "vera_lambda" in p_name:
                nn.init.normal_(p, std=0.3)
        return made

    return Case(name or f"{kind} of {base}", build, batch, loss, **facts)


def _frozen(s: Size) -> nn.Module:
    model = _bert(s)
    model.bert.requires_grad_(requires_grad=False)
    return model


def _biases(s: Size) -> nn.Module:
    model = _bert(s)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return model


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        _adapted("Lora", r=4, lora_dropout=0.1),
        _adapted("Lora", "GPT2", r=4, fan_in_fan_out=True),
        _adapted("Lora", "BERT", r=4),
        _adapted("Lora", "T5", r=4),
        _adapted("Lora", name="Lora, bias=all", r=4, bias="all"),
        _adapted("Lora", name="Lora of embeddings", r=4, target_modules=["embed_tokens", "q_proj"]),
        _adapted("Lora", name="Lora and a trained head", r=4, modules_to_save=["lm_head"]),
        _adapted("Lora", name="rsLoRA", r=4, use_rslora=True),
        _adapted("Lora", name="DoRA", r=4, use_dora=True),
        _adapted("Lora", name="DoRA, rank = batch", r=5, use_dora=True),
        _adapted("IA3", feedforward_modules=[]),
        _adapted("AdaLora", init_r=4, target_r=2, total_step=100),
        _adapted("Vera", r=4),
        _adapted("FourierFT", n_frequency=10),
        _adapted("LoKr", r=4),
        _adapted("LoHa", r=4),
        _adapted("OFT", r=0, oft_block_size=4),
        _adapted("BOFT", boft_block_size=4),
        _adapted("HRA", r=4),
        _adapted("LNTuning", target_modules=["input_layernorm"]),
        _adapted("PromptTuning", prompts=True, num_virtual_tokens=3),
        _adapted("PrefixTuning", prompts=True, num_virtual_tokens=3),
        _adapted("PromptEncoder", prompts=True, num_virtual_tokens=3, encoder_hidden_size=16),
        Case("BERT, only the head", _frozen, tokens, hugging.of_logits),
        Case("BitFit of BERT", _biases, tokens, hugging.of_logits),
    ]
