"""Losses of a user's own for models of transformers whose loss is not known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from privet.errors import ConfigurationError
from privet.integrations.huggingface.families import Family

__all__ = ["OwnLoss", "register_loss", "registered_for"]

OwnLoss = Callable[[Any, Any, Mapping[str, Any]], Tensor]
"""Returns the loss of each example, (B,), from the model, what it returned, and the batch."""
_F = TypeVar("_F", bound=OwnLoss)
_LOSSES: dict[type[nn.Module], tuple[OwnLoss, Family]] = {}


def register_loss(kind: type[nn.Module], *, labels: Sequence[str] = ("labels",)) -> Callable[[_F], _F]:
    """Returns a decorator that registers the loss of each example for a class of models, and for those derived from it.

    `per_example_loss`, `loss_per_example` and `PrivateTrainer` use it in place of a loss of their own. Each number must
    depend on its own example alone: at the paper's door this is checked as far as the loss can be read, and
    `PrivateStep` refuses what mixes examples.

    Args:
        kind: the class.
        labels: the entries of a batch that the model is not given.

    Raises:
        ConfigurationError: if `kind` is no class of modules.

    Example:
        >>> from transformers import BertForPreTraining
        >>> from torch.nn import functional as F
        >>> @register_loss(BertForPreTraining, labels=("labels", "next_sentence_label"))
        ... def pretraining(model, outputs, batch):
        ...     words = outputs.prediction_logits.transpose(1, 2)
        ...     masked = F.cross_entropy(words, batch["labels"], reduction="none").mean(1)
        ...     follows = outputs.seq_relationship_logits
        ...     return masked + F.cross_entropy(follows, batch["next_sentence_label"], reduction="none")
    """
    given: object = kind
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise ConfigurationError(
            f"register_loss takes a class of models, got {given!r}. Pass the class, not an object."
        )

    def register(loss: _F) -> _F:
        _LOSSES[kind] = loss, Family(f"{kind.__name__}, as registered", (), tuple(labels), _not_read)
        return loss

    return register


def registered_for(model: nn.Module) -> tuple[OwnLoss, Family] | None:
    """Returns the loss that was registered for a model's class, or for the nearest one that it derives from."""
    return next((_LOSSES[kind] for kind in type(model).__mro__ if kind in _LOSSES), None)


def _not_read(*rest: Any) -> Tensor:
    raise AssertionError("a registered loss is called with the model's outputs")
