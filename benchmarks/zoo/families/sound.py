"""Models of sound of transformers: of waves, and of spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Batch, Case, Size, classified, ids, labels
from benchmarks.zoo.families.hugging import LAYERS, built, text

# What wav2vec2 and its kin call their sizes; dropout, layer dropout and masks of the spectrum stay as they come.
WAVES = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_length": 2,
    "mask_time_min_masks": 1,
    "max_position_embeddings": None,
    "pad_token_id": 0,
}


def _waves(n: int, s: Size) -> Batch:
    return torch.randn(n, 400), labels(n)


def _heard(model: nn.Module, batch: Batch) -> Tensor:
    return classified(model(batch[0]).logits, batch[1])


def _spelled(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss of alignments of each wave with eight letters, divided by their number."""
    logits = model(batch[0]).logits.log_softmax(-1).transpose(0, 1)
    length = torch.full((len(batch[0]),), logits.shape[0])
    letters = torch.full((len(batch[0]),), 8)
    return nn.functional.ctc_loss(logits, batch[1][:, :8], length, letters, blank=0, reduction="none") / 8


def _wave(kind: str, head: str = "ForSequenceClassification", **more: Any) -> Case:
    build = built(f"{kind}Config", kind + head, lambda s: text(s, **(WAVES | more)))
    if head == "ForCTC":
        return Case(f"{kind} CTC", build, lambda n, s: (torch.randn(n, 400), *ids(n, s)), _spelled)
    return Case(kind, build, _waves, _heard)


def _mels(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_features=batch[0], decoder_input_ids=batch[1], use_cache=False).logits
    return classified(logits, batch[1])


def cases() -> list[Case]:
    """Returns the cases of this family."""
    whisper = {
        "d_model": 16,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "decoder_start_token_id": 2,
        "suppress_tokens": None,
        **LAYERS,
    }
    heard = lambda n, s: (torch.randn(n, 8, 32), *ids(n, s))  # noqa: E731
    return [
        _wave("Wav2Vec2"),
        _wave("Wav2Vec2", "ForCTC"),
        _wave("Hubert"),
        _wave("Hubert", "ForCTC"),
        _wave("WavLM"),
        _wave("UniSpeech", num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8),
        _wave("UniSpeechSat", num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8),
        _wave("SEW", squeeze_factor=2),
        _wave("SEWD", squeeze_factor=2, position_buckets=4, max_position_embeddings=40),
        _wave("Data2VecAudio", conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
        _wave("Wav2Vec2Conformer"),
        Case(
            "Wav2Vec2Bert",
            built(
                "Wav2Vec2BertConfig",
                "Wav2Vec2BertForSequenceClassification",
                lambda s: text(
                    s,
                    max_position_embeddings=None,
                    feature_projection_input_dim=8,
                    classifier_proj_size=8,
                    conv_depthwise_kernel_size=3,
                    mask_time_length=2,
                ),
            ),
            lambda n, s: (torch.randn(n, s.positions, 8), labels(n)),
            _heard,
        ),
        Case(
            "AST",
            built(
                "ASTConfig",
                "ASTForAudioClassification",
                lambda s: text(s, num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=4, time_stride=8),
            ),
            lambda n, s: (torch.randn(n, 32, 16), labels(n)),
            _heard,
        ),
        Case(
            "Whisper",
            built("WhisperConfig", "WhisperForConditionalGeneration", lambda s: text(s, **whisper)),
            heard,
            _mels,
        ),
        Case(
            "Whisper classifier",
            built("WhisperConfig", "WhisperForAudioClassification", lambda s: text(s, **whisper)),
            lambda n, s: (torch.randn(n, 8, 32), labels(n)),
            _heard,
        ),
        Case(
            "Speech2Text",
            built(
                "Speech2TextConfig",
                "Speech2TextForConditionalGeneration",
                lambda s: text(s, **{**whisper, "num_mel_bins": None}, input_feat_per_channel=8, conv_channels=16),
            ),
            lambda n, s: (torch.randn(n, 32, 8), *ids(n, s)),
            _mels,
        ),
        Case(
            "Moonshine",
            built(
                "MoonshineConfig",
                "MoonshineForConditionalGeneration",
                lambda s: text(
                    s,
                    num_hidden_layers=None,
                    num_attention_heads=None,
                    encoder_num_hidden_layers=2,
                    decoder_num_hidden_layers=2,
                    encoder_num_attention_heads=4,
                    decoder_num_attention_heads=4,
                ),
            ),
            lambda n, s: (torch.randn(n, 1600), *ids(n, s)),
            lambda m, b: classified(m(input_values=b[0], decoder_input_ids=b[1], use_cache=False).logits, b[1]),
        ),
    ]
