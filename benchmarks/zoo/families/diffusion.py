"""Models of diffusers: each predicts the noise in an image, at a step of its own for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Batch, Case, Size, squares


def _model(kind: str, **settings: Any) -> Any:
    def build(s: Size) -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, kind)(**settings)
        return made

    return build


def _noisy(n: int, s: Size) -> Batch:
    return torch.randn(n, 3, 16, 16), torch.randint(100, (n,))


def _conditioned(n: int, s: Size) -> Batch:
    return *_noisy(n, s), torch.randn(n, 6, 8)


def _denoised(model: nn.Module, batch: Batch) -> Tensor:
    return squares(model(batch[0], batch[1]).sample - batch[0])


def _told(model: nn.Module, batch: Batch) -> Tensor:
    return squares(model(batch[0], batch[1], encoder_hidden_states=batch[2]).sample - batch[0])


def cases() -> list[Case]:
    """Returns the cases of this family."""
    sizes = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    plain = {
        **sizes,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    crossed = {
        **sizes,
        "in_channels": 3,
        "out_channels": 3,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    coder = {
        "block_out_channels": (8, 16),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return [
        Case("UNet2D", _model("UNet2DModel", **plain), _noisy, _denoised),
        Case("UNet2DCondition", _model("UNet2DConditionModel", **crossed), _conditioned, _told),
        Case(
            "UNet1D",
            _model(
                "UNet1DModel",
                sample_size=16,
                in_channels=3,
                out_channels=3,
                extra_in_channels=64,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
                up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
                use_timestep_embedding=False,
                time_embedding_type="fourier",
            ),
            lambda n, s: (torch.randn(n, 3, 16), torch.randint(100, (n,))),
            _denoised,
        ),
        Case("AutoencoderKL", _model("AutoencoderKL", **coder), _noisy, lambda m, b: squares(m(b[0]).sample - b[0])),
        Case(
            "VQModel",
            _model("VQModel", **{**coder, "latent_channels": 4}),
            _noisy,
            lambda m, b: squares(m.decode(m.encode(b[0]).latents, force_not_quantize=True).sample - b[0]),
            paper=False,
        ),
        Case(
            "DiT",
            _model(
                "DiTTransformer2DModel",
                sample_size=16,
                in_channels=3,
                out_channels=3,
                patch_size=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_embeds_ada_norm=100,
            ),
            lambda n, s: (*_noisy(n, s), torch.randint(10, (n,))),
            lambda m, b: squares(m(b[0], timestep=b[1], class_labels=b[2]).sample - b[0]),
        ),
        Case(
            "PixArt",
            _model(
                "PixArtTransformer2DModel",
                sample_size=16,
                in_channels=3,
                out_channels=3,
                patch_size=4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=8,
                use_additional_conditions=False,
            ),
            _conditioned,
            lambda m, b: squares(
                m(
                    b[0],
                    encoder_hidden_states=b[2],
                    timestep=b[1],
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                ).sample
                - b[0]
            ),
        ),
    ]
