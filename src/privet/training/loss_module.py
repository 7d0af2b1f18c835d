"""The loss of each example at the explicit door: one module with the model, and a check of what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from privet.errors import ConfigurationError
from privet.gradients.capture.eager import refuse_compiled, warn_of_compiled
from privet.gradients.spread import is_part

__all__ = ["LossModule", "LossPerExample"]

LossPerExample = Callable[[nn.Module, Any], Tensor]


@final
class LossModule(nn.Module):
    """The model and its loss as one module of the batch."""

    def __init__(self, model: nn.Module, loss: LossPerExample) -> None:
        super().__init__()
        warn_of_compiled(model, loss)
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        """Returns what the user's loss returns."""
        return self._loss(self.model, batch)

    def begins(self) -> None:
        """Raises if a step that begins now is traced by torch.compile; warns if the model was compiled since."""
        refuse_compiled(trains=True)
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            warn_of_compiled(self.model)

    def checked(self, batch: Any, examples: int) -> Tensor:  # (B,)
        """Returns the loss of each example, or raises ConfigurationError if it is none."""
        losses = self(batch)
        if is_part(losses):
            raise ConfigurationError(
                "loss_per_example returned a tensor that is distributed over ranks. Expected losses that are whole on "
                "each of them. Give the model's last plan output_layouts=Replicate(), and leave use_local_output=True."
            )
        if not isinstance(losses, Tensor) or losses.shape != (examples,):
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            if isinstance(losses, Tensor) and losses.shape == (examples, examples) and examples > 1:
                found += " (outputs of (B, 1) broadcast against targets of (B,), or every example with every other?)"
            raise ConfigurationError(
                f"loss_per_example returned {found} for a batch of {examples}. Expected one loss for each example, of "
                f"shape ({examples},): use reduction='none', and take the mean or sum over all axes but the first."
            )
        if not losses.requires_grad:
            raise ConfigurationError(
                "loss_per_example returned losses that need no gradient. Expected them to depend on the model's "
                "trainable parameters. Do not detach them, and do not compute them under no_grad()."
            )
        return losses
