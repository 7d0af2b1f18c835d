"""Tiny models of transformers with data, one of each family, built from configurations and never downloaded.

Legend: N examples, T positions, V words.
"""

from __future__ import annotations

import torch

N, T, V = 6, 7, 23
SMALL = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def tokens(*shape):
    return torch.randint(1, V, shape)


def with_gaps(labels):
    """Returns labels of which each example leaves out another number, so that a mean over all tokens is another."""
    labels = labels.clone()
    for i, row in enumerate(labels):
        row[: i % 4 + 1] = -100
    return labels


def records(**columns):
    """Returns a dataset of one mapping for each example."""
    return [{key: value[i] for key, value in columns.items()} for i in range(N)]


def text():
    mask = torch.ones(N, T, dtype=torch.long)
    mask[:, -1] = 0  # in all: transformers leaves the mask of a batch away in which nobody has padding
    mask[0, 5:] = 0
    return {"input_ids": tokens(N, T), "attention_mask": mask}


def bert(head, labels, **more):
    import transformers

    config = transformers.BertConfig(**SMALL, **more)
    return getattr(transformers, f"BertFor{head}")(config), records(**text(), **labels)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    inputs = text()
    return GPT2LMHeadModel(config), records(**inputs, labels=with_gaps(inputs["input_ids"]))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    inputs = text()
    return LlamaForCausalLM(config), records(**inputs, labels=with_gaps(inputs["input_ids"]))


def lora():
    from peft import LoraConfig, get_peft_model

    model, data = llama()
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient
            torch.nn.init.normal_(p)
    return model, data


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), records(**text(), labels=with_gaps(tokens(N, 5)))


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=V, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_ffn_dim=16,
        decoder_attention_heads=2, encoder_ffn_dim=16, max_position_embeddings=16, dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config), records(**text(), labels=with_gaps(tokens(N, 5)))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), records(
        pixel_values=torch.randn(N, 1, 8, 8, dtype=torch.float64), labels=torch.randint(3, (N,))
    )


def choice():
    from transformers import BertConfig, BertForMultipleChoice

    inputs = {"input_ids": tokens(N, 3, T), "attention_mask": torch.ones(N, 3, T, dtype=torch.long)}
    return BertForMultipleChoice(BertConfig(**SMALL)), records(**inputs, labels=torch.randint(3, (N,)))


def speech(reduction):
    """Returns a model of waves of several lengths, with several numbers of letters."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(4, 4),
        conv_kernel=(4, 3), conv_stride=(3, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False,
        feat_extract_norm="layer", ctc_loss_reduction=reduction,
    )  # fmt: skip
    mask = torch.ones(N, 120, dtype=torch.long)
    mask[0, 90:] = 0
    letters = torch.randint(1, V, (N, 6))
    letters[1, 4:] = -100
    return Wav2Vec2ForCTC(config), records(
        input_values=torch.randn(N, 120).double() * mask, attention_mask=mask, labels=letters
    )


FAMILIES = {
    "classes": lambda: bert("SequenceClassification", {"labels": torch.randint(3, (N,))}, num_labels=3),
    "several labels": lambda: bert(
        "SequenceClassification", {"labels": torch.randint(2, (N, 3)).double()}, num_labels=3
    ),
    "a number": lambda: bert("SequenceClassification", {"labels": torch.randn(N).double()}, num_labels=1),
    "several numbers": lambda: bert(
        "SequenceClassification",
        {"labels": torch.randn(N, 3).double()},
        num_labels=3,
        problem_type="regression",
    ),
    "tokens": lambda: bert("TokenClassification", {"labels": with_gaps(torch.randint(3, (N, T)))}, num_labels=3),
    "answers": lambda: bert(
        "QuestionAnswering",
        {"start_positions": torch.arange(N), "end_positions": torch.arange(N) + 1},
    ),
    "masked words": lambda: bert("MaskedLM", {"labels": with_gaps(tokens(N, T))}),
    "choices": choice,
    "GPT-2": gpt2,
    "Llama": llama,
    "LoRA": lora,
    "T5": t5,
    "BART": bart,
    "images": vit,
    "next sentences": lambda: bert("NextSentencePrediction", {"labels": torch.randint(2, (N,))}),
    "speech": lambda: speech("mean"),
    "speech, summed": lambda: speech("sum"),
}


def built(name):
    """Returns a model in double precision and its dataset."""
    model, data = FAMILIES[name]()
    return model.double(), data


def batch_of(data):
    return {key: torch.stack([record[key] for record in data]) for key in data[0]}
