"""Lets torchvision be imported beside a build of torch that its compiled part is not for.

torchvision's wheels hold operations compiled for CUDA. Beside a torch for CPUs they cannot be loaded, and the import
then fails at two operations (non-maximum suppression) that are described, and were never declared. No model here calls
one: timm and transformers only import the package. So they are declared, without an implementation.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

__all__ = ["declare"]

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[torch.library.Library] = []


def declare() -> None:
    """Declares what torchvision describes, if torchvision is there and cannot be imported without."""
    if importlib.util.find_spec("torchvision") is None or _kept:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        _kept.append(library)  # what it declares ends with it
        for name in ("nms", "qnms"):
            library.define(name + _SIGNATURE)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
