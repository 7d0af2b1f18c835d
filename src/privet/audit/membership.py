"""Membership inference on a model that is trained already: by its loss alone, or by likelihood ratios (LiRA).

scores = loss_scores(model, records, loss_per_example)             # no other model is needed
roc = Roc(scores[members], scores[others])

attack = LikelihoodRatio.of_shadows(shadow_scores, shadow_members)  # S models trained on random halves
roc = Roc(*attack.split(scores, members))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import log_ndtr
from torch import Tensor, nn

from privet._checks import check_count
from privet.audit.planted import LossPerExample, evaluating
from privet.audit.roc import Roc
from privet.errors import ConfigurationError

__all__ = ["LikelihoodRatio", "by_class", "loss_scores", "train_shadows"]

_LEAST_SPREAD = 1e-6


def loss_scores(model: nn.Module, batches: Any, loss_per_example: LossPerExample) -> np.ndarray:  # (N,)
    """Returns a score for each record that is high for members: minus its loss, on a scale that is near a normal law.

    The score is log(p / (1 - p)) of p = exp(-loss), as LiRA takes it: unlike a loss it does not pile up at 0.

    Args:
        model: the model that is attacked.
        batches: an iterable of batches, such as a `DataLoader` that does not shuffle.
        loss_per_example: `loss(model, batch)` returns the loss of each example, `(B,)`.
    """
    parts: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            losses = loss_per_example(model, batch).double().cpu()
            if losses.dim() != 1:
                raise ConfigurationError(
                    f"loss_per_example gave a tensor of shape {tuple(losses.shape)}. Expected the loss of each example."
                )
            parts.append(losses)
    if not parts:
        raise ConfigurationError("there were no batches. Expected the records that are attacked.")
    losses = torch.cat(parts)
    return np.asarray((-losses - torch.log(-torch.expm1(-losses.clamp(min=1e-12)))).numpy())


def by_class(scores: Any, members: Any, labels: Any) -> Mapping[Any, Roc]:
    """Returns the ROC of each class that has members and others: a leak may be that of one class alone."""
    values, chosen, of = np.asarray(scores, dtype=float), np.asarray(members, dtype=bool), np.asarray(labels)
    found = {}
    for label in np.unique(of):
        here = of == label
        if chosen[here].any() and (~chosen[here]).any():
            found[label.item()] = Roc(values[here & chosen], values[here & ~chosen])
    return found


class LikelihoodRatio:
    """LiRA: for each record, how likely its score is among models with it and among models without it.

    Args:
        inside: (N, 2) mean and deviation of each record's score under models that were trained on it.
        outside: (N, 2) the same under models that were not.

    Source: Carlini et al., arXiv 2112.03570, algorithm 1 (online), and its section 4.2 with `inside=None` (offline).
    """

    def __init__(self, inside: np.ndarray | None, outside: np.ndarray) -> None:
        self._inside, self._outside = inside, outside

    @classmethod
    def of_shadows(cls, scores: Any, members: Any, *, offline: bool = False) -> LikelihoodRatio:
        """Returns the attack of shadow models.

        Args:
            scores: (S, N) score of each record under each shadow model.
            members: (S, N) whether the record was trained on.
            offline: whether models that were trained on a record are left aside.

        Raises:
            ConfigurationError: if a record has fewer than 2 shadow models on a side that is needed.
        """
        values, chosen = np.asarray(scores, dtype=float), np.asarray(members, dtype=bool)
        if values.ndim != 2 or values.shape != chosen.shape:
            raise ConfigurationError(
                f"expected scores and members of one shape (S, N), got {values.shape} and {chosen.shape}."
            )
        outside = _normal(values, ~chosen)
        return cls(None if offline else _normal(values, chosen), outside)

    def ratio(self, scores: Any) -> np.ndarray:  # (N,)
        """Returns the log likelihood ratio of each record's score under the attacked model; high for members."""
        values = np.asarray(scores, dtype=float)
        mean, spread = self._outside.T
        if self._inside is None:
            return np.asarray(-log_ndtr(-(values - mean) / spread))
        return np.asarray(_log_normal(values, *self._inside.T) - _log_normal(values, mean, spread))

    def split(self, scores: Any, members: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ratios of members and of others, as `Roc` takes them."""
        ratio, chosen = self.ratio(scores), np.asarray(members, dtype=bool)
        return ratio[chosen], ratio[~chosen]


def _normal(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:  # (S, N) -> (N, 2)
    counts = chosen.sum(axis=0)
    if counts.min() < 2:
        raise ConfigurationError(
            f"a record has {counts.min()} shadow models on one side. Expected at least 2 with it and 2 without it: "
            "train more shadow models, each on a random half."
        )
    mean = np.where(chosen, values, 0.0).sum(axis=0) / counts
    square = np.where(chosen, (values - mean) ** 2, 0.0)
    # With few models a deviation of a record alone is a guess; one for all is steadier (section 4.3 there).
    own = np.sqrt(square.sum(axis=0) / (counts - 1))
    spread = own if counts.min() >= 64 else np.full_like(mean, np.sqrt(square.sum() / (counts - 1).sum()))
    return np.stack([mean, np.maximum(spread, _LEAST_SPREAD)], axis=1)


def _log_normal(values: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return np.asarray(-(((values - mean) / spread) ** 2) / 2.0 - np.log(spread))


def train_shadows(
    train: Callable[[Sequence[int]], nn.Module],
    records: int,
    shadows: int,
    score: Callable[[nn.Module], np.ndarray],
    *,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains shadow models, each on a random half, and returns scores and members, (S, N), for `of_shadows`.

    Every record is in half of the models, give or take one.

    Args:
        train: `train(indices)` returns a model that was trained on those records.
        records: N.
        shadows: S, at least 4.
        score: `score(model)` returns the score of each of the N records, such as `loss_scores`.
        seed: of the halves. They are no secret.
    """
    check_count("records", records, 2)
    check_count("shadows", shadows, 4)
    draws = torch.Generator().manual_seed(seed)
    members = np.zeros((shadows, records), dtype=bool)
    for first in range(0, shadows, 2):  # in pairs: a half, and the other one
        half = torch.randperm(records, generator=draws)[: records // 2].numpy()
        members[first, half] = True
        if first + 1 < shadows:
            members[first + 1] = ~members[first]
    scores = [score(train(np.flatnonzero(chosen).tolist())) for chosen in members]
    return np.stack(scores), members
