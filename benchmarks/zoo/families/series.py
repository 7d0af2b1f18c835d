"""Models of time series of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Batch, Case, Size, labels, squares
from benchmarks.zoo.families.hugging import LAYERS, built

PAST, FUTURE = 8, 4


def _series(n: int, s: Size) -> Batch:
    length = PAST + 2  # the longest lag
    return (
        torch.randn(n, length),
        torch.randn(n, length, 1),
        torch.ones(n, length),
        torch.randn(n, FUTURE),
        torch.randn(n, FUTURE, 1),
    )


def _inner(kind: str, **more: Any) -> Any:
    """Returns a builder of what a forecaster has inside: its own forward reduces the loss."""
    settings: dict[str, Any] = {
        "prediction_length": FUTURE,
        "context_length": PAST,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        **LAYERS,
        **more,
    }
    return built(f"{kind}Config", f"{kind}Model", lambda s: settings)


def _forecast(model: nn.Module, batch: Batch) -> Tensor:
    names = ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features")
    return squares(model(**dict(zip(names, batch, strict=True))).last_hidden_state)


def cases() -> list[Case]:
    """Returns the cases of this family."""
    patches = {
        "num_input_channels": 2,
        "context_length": 32,
        "patch_length": 4,
        "patch_stride": 4,
        "stride": 4,
        "d_model": 16,
        "num_hidden_layers": 2,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 32,
        "num_targets": 3,
    }
    two = lambda n, s: (torch.randn(n, 32, 2), labels(n))  # noqa: E731
    loss = lambda m, b: nn.functional.cross_entropy(m(past_values=b[0])[0], b[1], reduction="none")  # noqa: E731
    return [
        Case("TimeSeriesTransformer", _inner("TimeSeriesTransformer"), _series, _forecast),
        Case("Informer", _inner("Informer", attention_type="full"), _series, _forecast),
        Case("Informer sparse", _inner("Informer"), _series, _forecast),
        Case("Autoformer", _inner("Autoformer", moving_average=3, label_length=2), _series, _forecast, double=False),
        Case(
            "PatchTST",
            built("PatchTSTConfig", "PatchTSTForClassification", lambda s: patches | {"norm_type": "layernorm"}),
            two,
            loss,
            note="norm_type='layernorm': as it comes it has batch normalization",
        ),
        Case(
            "PatchTST as it comes",
            built("PatchTSTConfig", "PatchTSTForClassification", lambda s: patches),
            two,
            loss,
            refused="BatchNorm",
            note="norm_type='layernorm' is exact",
        ),
        Case(
            "PatchTSMixer",
            built("PatchTSMixerConfig", "PatchTSMixerForTimeSeriesClassification", lambda s: patches),
            two,
            loss,
        ),
    ]
