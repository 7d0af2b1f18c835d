"""Models of images and videos of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, classified, images, labels, squares
from benchmarks.zoo.families.hugging import built

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
CONV = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
NORM = "BatchNorm"
FIXED = "get_compatible_module puts group normalization in place"


def _seen(model: nn.Module, batch: Batch) -> Tensor:
    return classified(model(pixel_values=batch[0]).logits, batch[1])


def _image(kind: str, *, head: str = "ForImageClassification", name: str = "", **more: Any) -> Case:
    facts = {k: more.pop(k) for k in ("note", "refused") if k in more}
    build = built(f"{kind}Config", kind + head, lambda s: {"image_size": s.pixels, "num_labels": CLASSES, **more})
    return Case(name or kind, build, images, _seen, **facts)


def _of_clip(s: Size) -> nn.Module:
    return built("CLIPVisionConfig", "CLIPVisionModel", lambda s: {"image_size": s.pixels, **VIT})(s)


def _by_brightness(model: Any, pixels: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, L)
    """Returns a number for each patch, by which the model leaves patches out: drawn, they would differ in each run."""
    return F.avg_pool2d(pixels.mean(1, keepdim=True), model.config.patch_size).flatten(1)


def _videos(n: int, s: Size) -> Batch:
    return torch.randn(n, 4, 3, s.pixels, s.pixels), labels(n)


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        _image("ViT", **VIT),
        _image("ViTMSN", **VIT),
        _image("DeiT", **VIT),
        _image("Beit", use_relative_position_bias=True, **VIT),
        _image("Data2VecVision", use_relative_position_bias=True, **VIT),
        _image("Dinov2", **VIT),
        _image("Dinov2WithRegisters", **VIT),
        _image("IJepa", **VIT),
        Case("CLIP vision", _of_clip, images, lambda m, b: squares(m(pixel_values=b[0]).pooler_output)),
        _image("Swin", **SWIN),
        _image("Swinv2", **SWIN),
        _image("ConvNext", **CONV),
        _image("ConvNextV2", **CONV),
        _image(
            "PoolFormer",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            patch_sizes=[7, 3],
            strides=[4, 2],
            padding=[2, 1],
        ),
        _image(
            "Pvt",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            sequence_reduction_ratios=[2, 1],
            patch_sizes=[4, 2],
            strides=[4, 2],
        ),
        _image(
            "PvtV2",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
        ),
        _image(
            "Hiera",
            embed_dim=8,
            image_size=[32, 32],
            patch_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            depths=[1, 1],
            num_heads=[1, 2],
            query_stride=[2, 2],
            num_query_pool=1,
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
        ),
        _image("FocalNet", embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3], hidden_sizes=[8, 16]),
        _image(
            "Segformer",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            decoder_hidden_size=16,
        ),
        Case(
            "ImageGPT",
            built(
                "ImageGPTConfig",
                "ImageGPTForImageClassification",
                lambda s: {
                    "vocab_size": 50,
                    "n_positions": 20,
                    "n_embd": 16,
                    "n_layer": 2,
                    "n_head": 4,
                    "num_labels": CLASSES,
                },
            ),
            lambda n, s: (torch.randint(50, (n, s.positions)), labels(n)),
            lambda m, b: classified(m(input_ids=b[0]).logits, b[1]),
        ),
        _image("Bit", hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, num_groups=2),
        _image("MobileViT", refused=NORM, note=FIXED),
        _image("MobileNetV2", refused=NORM, note=FIXED),
        _image("EfficientNet", width_coefficient=0.1, depth_coefficient=0.3, hidden_dim=32, refused=NORM, note=FIXED),
        _image("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], refused=NORM, note=FIXED),
        _image(
            "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, refused=NORM, note=FIXED
        ),
        _image("Levit", refused=NORM, note=FIXED),
        _image("Cvt", embed_dim=[8, 16, 16], num_heads=[1, 2, 4], depth=[1, 2, 3], refused=NORM, note=FIXED),
        Case(
            "ViT MAE",
            built(
                "ViTMAEConfig",
                "ViTMAEModel",
                lambda s: {
                    "image_size": s.pixels,
                    "decoder_hidden_size": 16,
                    "decoder_num_attention_heads": 4,
                    "decoder_num_hidden_layers": 1,
                    "decoder_intermediate_size": 32,
                    **VIT,
                },
            ),
            images,
            lambda m, b: squares(m(pixel_values=b[0], noise=_by_brightness(m, b[0])).last_hidden_state),
        ),
        Case(
            "VideoMAE",
            built(
                "VideoMAEConfig",
                "VideoMAEForVideoClassification",
                lambda s: {"image_size": s.pixels, "num_frames": 4, "tubelet_size": 2, "num_labels": CLASSES, **VIT},
            ),
            _videos,
            _seen,
        ),
        Case(
            "TimeSformer",
            built(
                "TimesformerConfig",
                "TimesformerForVideoClassification",
                lambda s: {"image_size": s.pixels, "num_frames": 4, "num_labels": CLASSES, **VIT},
            ),
            _videos,
            _seen,
        ),
        Case(
            "ViViT",
            built(
                "VivitConfig",
                "VivitForVideoClassification",
                lambda s: {
                    "image_size": s.pixels,
                    "num_frames": 4,
                    "tubelet_size": [2, 8, 8],
                    "num_labels": CLASSES,
                    **VIT,
                },
            ),
            _videos,
            _seen,
        ),
        Case("DETR", _detr, images, lambda m, b: classified(m(pixel_values=b[0]).logits.mean(1), b[1])),
        Case(
            "SegFormer for pixels",
            built(
                "SegformerConfig",
                "SegformerForSemanticSegmentation",
                lambda s: {
                    "hidden_sizes": [8, 16],
                    "depths": [1, 1],
                    "num_encoder_blocks": 2,
                    "num_attention_heads": [1, 2],
                    "mlp_ratios": [2, 2],
                    "sr_ratios": [2, 1],
                    "patch_sizes": [7, 3],
                    "strides": [4, 2],
                    "decoder_hidden_size": 16,
                    "num_labels": CLASSES,
                },
            ),
            images,
            lambda m, b: squares(m(pixel_values=b[0]).logits),
            refused=NORM,
            note=FIXED,
        ),
    ]


def _detr(s: Size) -> nn.Module:
    import transformers

    backbone = transformers.SwinConfig(image_size=s.pixels, out_features=["stage2"], **SWIN)
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=4,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_labels=CLASSES - 1,
    )
    made: nn.Module = transformers.DetrForObjectDetection(config)
    return made
