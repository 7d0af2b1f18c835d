"""Models of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.zoo.case import CLASSES, Case, Size, by_class, images
from benchmarks.zoo.families.vision import FIXED, NORM


def _timm(kind: str, *, name: str = "", fixed: bool = False, **settings: Any) -> Case:
    facts = {k: settings.pop(k) for k in ("note", "refused") if k in settings}

    def build(s: Size) -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(kind, pretrained=False, num_classes=CLASSES, **settings)
        if fixed:
            from privet import PrivacyEngine

            made = PrivacyEngine().get_compatible_module(made.train())
        return made

    return Case(name or kind, build, images, by_class, **facts)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4)}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}


def cases() -> list[Case]:
    """Returns the cases of this family."""
    return [
        _timm("vit_tiny_patch16_224", **VIT),
        _timm("deit_tiny_distilled_patch16_224", **VIT),
        _timm("beit_base_patch16_224", **VIT),
        _timm("eva02_tiny_patch14_224", **VIT),
        _timm("cait_xxs24_224", **VIT),
        _timm("swin_tiny_patch4_window7_224", **SWIN),
        _timm("swinv2_tiny_window8_256", **SWIN),
        _timm("convnext_atto", **STAGES),
        _timm("convnextv2_atto", **STAGES),
        _timm("xcit_nano_12_p16_224", refused=NORM, note=FIXED, **VIT),
        _timm("resnet18", refused=NORM, note=FIXED, channels=(4, 4, 8, 8)),
        _timm("resnet18", name="resnet18, fixed", fixed=True, channels=(4, 4, 8, 8)),
        _timm("mobilenetv3_small_050", refused=NORM, note=FIXED),
        _timm("efficientnet_b0", refused=NORM, note=FIXED),
        _timm("regnetx_002", refused=NORM, note=FIXED),
    ]
