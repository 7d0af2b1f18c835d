"""Models of transformers in the configuration they come in: exact without dropout, and taken with it."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:rows were moved along the batch:UserWarning"),
    pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning"),
]

B, T, V, C = 4, 8, 20, 0.01
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (4, 4),
    "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_length": 2, "mask_time_min_masks": 1,
}  # fmt: skip


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4,
        norm_rel_ebd="layer_norm", max_relative_positions=-1, type_vocab_size=0,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def speech(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SPEECH)
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def of_text(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits, batch[1], reduction="none")


def of_sound(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")


def of_pairs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(input_ids=batch[0], decoder_input_ids=batch[0]).logits
    return F.cross_entropy(logits.transpose(1, 2), batch[0], reduction="none").mean(1)


MODELS = {
    "T5": (t5, of_pairs, lambda: torch.randint(1, V, (B, T))),
    "DeBERTa-v2": (deberta, of_text, lambda: torch.randint(1, V, (B, T))),
    "wav2vec2": (lambda: speech("Wav2Vec2"), of_sound, lambda: torch.randn(B, 200)),
    "WavLM": (lambda: speech("WavLM"), of_sound, lambda: torch.randn(B, 200)),
}


def private_step(model: nn.Module, loss, noise: float) -> PrivateStep:
    return PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(C), noise=Gaussian(noise)),
        loss_per_example=loss,
        expected_batch_size=1,
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_sum_of_one_example_at_a_time(name):
    build, loss, draw = MODELS[name]
    model = build().double().eval()
    batch = (draw().double() if name in {"wav2vec2", "WavLM"} else draw(), torch.randint(2, (B,)))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(B):
        model.zero_grad()
        loss(model, (batch[0][i : i + 1], batch[1][i : i + 1])).sum().backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        for each, p in model.named_parameters():
            if p.grad is not None:
                expected[each] += p.grad * min(1.0, C / float(norm))
    model.zero_grad()
    moved = copy.deepcopy(model)
    private_step(moved, loss, 0.0)(batch)
    after = dict(moved.named_parameters())
    for each, p in model.named_parameters():
        assert torch.allclose(p - after[each], expected[each], rtol=1e-6, atol=1e-11), each


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_with_the_dropout_that_it_comes_with(name):
    build, loss, draw = MODELS[name]
    model = build().train()
    step = private_step(model, loss, 1.0)
    for _ in range(3):
        assert step((draw(), torch.randint(2, (B,)))).isfinite().all()
    assert step.ledger.steps == 3
