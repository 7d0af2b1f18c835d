"""A step that releases several private gradients of one batch: declared by the noise, and billed once for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from privet.errors import ConfigurationError, ProtocolError
from privet.mechanism import Mechanism
from privet.noise import Noise, SeveralReleases
from privet.training.update import PrivateUpdate

__all__ = ["Between", "refuse_several", "release_each"]

Between = Callable[[int], None]
"""What is done after each of several releases, given its number: from 0 on."""


def release_each(
    update: PrivateUpdate,
    optimizer: torch.optim.Optimizer,
    receive: Callable[[], Tensor],
    between: Between,
) -> Tensor:  # (B,)
    """Releases as many gradients as the noise declares, and returns the losses of the first forward.

    Args:
        update: bills the first of them with the event of all, and the others not at all.
        optimizer: whose step is to come.
        receive: computes the sum of the batch for the weights of now, hands it to the update, and returns the losses.
        between: called with the number of each release, from 0 on, once it is in `p.grad`.

    Raises:
        ConfigurationError: if the noise does not declare several releases, or there are several ranks.
        ProtocolError: if the mechanism changed in between. What was released is billed.
    """
    mechanism = update.mechanism
    if not isinstance(mechanism.noise, SeveralReleases):
        raise ConfigurationError(
            f"several releases of one batch were asked for, and the mechanism declares one: its noise is "
            f"{mechanism.noise!r}. Expected noise=SeveralReleases(multiplier, releases=k), which bills them together."
        )
    if update.ranks.share.ranks > 1:
        raise ConfigurationError(
            f"several releases of one batch were asked for on {update.ranks.found}. Expected one process."
        )
    losses = receive()
    update.hooks.release_early(optimizer)
    between(0)
    for number in range(1, mechanism.noise.releases):
        receive()
        _refuse_change(update, mechanism)
        with update.billing.paid_already():
            update.hooks.release_early(optimizer)
        between(number)
    return losses


def _refuse_change(update: PrivateUpdate, before: Mechanism) -> None:
    if update.mechanism != before:
        update.discard()
        raise ProtocolError(
            f"the mechanism changed between two releases of one batch, which were billed as {before}, to "
            f"{update.mechanism}. Expected the same for all of them. Let a schedule move between steps."
        )


def refuse_several(noise: Noise) -> None:
    """Raises ConfigurationError for a noise that declares several releases, where there is one for each backward."""
    if isinstance(noise, SeveralReleases) and noise.releases > 1:
        raise ConfigurationError(
            f"{noise!r} declares several releases of one batch, and at the paper's door a second backward on a batch "
            "cannot be told from one on other examples. Expected PrivateStep, whose several() releases them in one "
            "call. A second step on a batch at this door is billed as a release without amplification by sampling."
        )
