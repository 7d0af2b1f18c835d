"""What a model that mixes examples probably does, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["idiom_of"]

_SEQUENTIAL = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer)
_NORMS = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001 - there is no public name of all of them


def idiom_of(module: nn.Module, found: Sequence[str], *, batch_axis: int) -> str:
    """Returns advice for what the probe found: one sentence or several.

    Args:
        module: the model.
        found: what `find_mixing` returned for it.
        batch_axis: where the batch is, 0 or 1.
    """
    advice: list[str] = []
    wanted = batch_axis == 0
    turned = [
        f"{name or 'the model'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, _SEQUENTIAL) and bool(getattr(part, "batch_first", wanted)) is not wanted
    ]
    if turned:
        advice.append(
            f"{', '.join(turned[:3])} has batch_first={not wanted}, and may take the batch for time: give it "
            f"batch_first={wanted}, or inputs whose axes are swapped."
        )
    if any(isinstance(part, _NORMS) for part in module.modules()):
        advice.append("Batch normalization mixes examples: use GroupNorm or LayerNorm.")
    if any("how many examples" in each for each in found):
        advice.append(
            "A loss or an output that is divided by the size of the batch depends on who is in it: leave the division "
            "to the step, which divides by a public constant."
        )
    if any("written from the data" in each for each in found):
        advice.append(
            "State that is written from the data is released without noise: compute it before training from public "
            "data, or return it as an output and keep it outside of the model."
        )
    if any("batches before" in each for each in found):
        advice.append("Let the forward depend on its arguments, and draw from torch's global generator.")
    if any("other examples" in each for each in found):
        advice.append(
            "Take statistics, thresholds and orders over each example, not over the batch, and let no example attend "
            "to another one. If it is a contrastive loss, over pairs of examples inside a batch (CLIP, SimCLR, "
            "in-batch negatives), no clipping bounds it: make a pair or a group one row of the dataset, with negatives "
            "of its own."
        )
    return " ".join(advice)
