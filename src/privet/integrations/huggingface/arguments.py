"""What a private training is told beside transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from privet._checks import check_at_least, check_choice, check_positive, check_target_delta
from privet.accounting.event import Unit
from privet.errors import ConfigurationError

__all__ = ["PrivacyArguments"]


def _told(words: str, default: Any = None) -> Any:
    """Returns a field with the help that HfArgumentParser prints."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The guarantee of a `PrivateTrainer`. It holds plain numbers and words, so that HfArgumentParser can read it.

    Args:
        target_delta: δ of every ε that is computed; well below 1 / (number of training examples).
        noise_multiplier: the noise's standard deviation over the clip norm.
        target_epsilon: ε of the whole training. Without `noise_multiplier`, the least noise that meets it in the
            planned number of steps is taken. In both cases training ends before the step that would exceed it.
        max_grad_norm: the clip norm C of each example's gradient.
        clipping: `"flat"`, `"per_layer"`, `"automatic"` or `"psac"`.
        accountant: `"pld"` (the tightest), `"rdp"` or `"gdp"`.
        unit: whose data one record of the dataset is: `"example"`, `"sequence"`, `"user"` or `"group"`. By default an
            example, and for language models a sequence. It is said with ε, and changes no number.
        secure_mode: whether noise must be cryptographically secure on every device.
        log_loss: whether the training loss is logged. It is computed from the private data and gets no noise, and
            transformers writes it into checkpoints and model cards.

    Raises:
        ConfigurationError: for a value out of range, or if there is neither noise nor a target.

    Example:
        >>> PrivacyArguments(target_epsilon=8.0, target_delta=1e-5).max_grad_norm
        1.0
    """

    target_delta: float = field(metadata={"help": "The delta of every epsilon; well below 1 / number of examples."})
    noise_multiplier: float | None = _told("The noise's standard deviation over the clip norm.")
    target_epsilon: float | None = _told("The epsilon of the whole training; noise is chosen for it if none is given.")
    max_grad_norm: float = _told("The clip norm of each example's gradient.", 1.0)
    clipping: str = _told("flat, per_layer, automatic or psac.", "flat")
    accountant: str = _told("pld, rdp or gdp.", "pld")
    unit: str | None = _told("Whose data one record is: example, sequence, user or group.")
    secure_mode: bool = _told("Whether noise must be cryptographically secure on every device.", default=False)
    log_loss: bool = _told("Whether the training loss, which is not private, is logged.", default=True)

    def __post_init__(self) -> None:
        check_target_delta("target_delta", self.target_delta)
        check_positive("max_grad_norm", self.max_grad_norm)
        if self.noise_multiplier is not None:
            check_at_least("noise_multiplier", self.noise_multiplier)
        if self.target_epsilon is not None:
            check_positive("target_epsilon", self.target_epsilon)
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise ConfigurationError(
                "PrivacyArguments has neither noise_multiplier nor target_epsilon. Expected one of them: the noise, or "
                "the ε that it is chosen for. Give noise_multiplier=1.0, or target_epsilon=8.0."
            )
        if self.unit is not None:
            check_choice("unit", self.unit, tuple(each.value for each in Unit))
