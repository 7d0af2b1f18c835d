"""Sharpness-aware minimization: a gradient where the loss near the weights is largest. Two releases of each batch."""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from privet._checks import check_positive
from privet.errors import ConfigurationError
from privet.training.several import Between

__all__ = ["SharpnessAware"]


class _Step(Protocol):
    """What is asked of the step: a model, and several releases of one batch."""

    @property
    def model(self) -> nn.Module: ...

    def several(self, batch: Any, between: Between) -> Tensor: ...


@final
class SharpnessAware:
    """Takes steps by the private gradient at weights that a first private gradient has moved uphill.

    The weights w are moved to `w + radius * g / |g|` by a first released gradient g of the batch; the gradient of the
    same batch is released there; the weights are put back, and the optimizer steps by the second gradient. (Foret et
    al., 2021, arXiv:2010.01412, algorithm 1.) Both gradients are releases, of one batch: the mechanism has to declare
    `noise=SeveralReleases(multiplier)`, and each has noise of that multiplier. At one epsilon that is sqrt(2) times
    the noise of plain DP-SGD; and the direction uphill is mostly noise.

    Args:
        step: a PrivateStep whose noise is `SeveralReleases` of 2.
        radius: how far the weights are moved, over all parameters together.

    Raises:
        ConfigurationError: for a radius that is not above 0; or, when it is called, if the mechanism declares another
            number of releases than two.

    Example:
        >>> import torch
        >>> from privet import Flat, Mechanism, Poisson, PrivateStep, SeveralReleases, SharpnessAware
        >>> model = torch.nn.Linear(4, 1)
        >>> step = PrivateStep(
        ...     model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=SeveralReleases(1.5), steps=4),
        ...     loss_per_example=lambda model, batch: model(batch[0]).square().sum(1),
        ... )
        >>> aware = SharpnessAware(step, radius=0.05)
        >>> for batch in step.batches(torch.utils.data.TensorDataset(torch.randn(64, 4))):
        ...     losses = aware(batch)
        >>> step.ledger.steps
        4
    """

    def __init__(self, step: _Step, *, radius: float = 0.05) -> None:
        self._step, self.radius = step, check_positive("radius", radius)
        self._own: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, batch: Any) -> Tensor:  # (B,)
        """Takes one step on a batch, and returns the examples' losses at the weights of before. They are not private.

        Raises:
            ConfigurationError: see the class.
            BudgetExceededError: if the step would exceed the budget. It was not taken.
        """
        declared = getattr(getattr(self._step, "mechanism", None), "noise", None)
        if getattr(declared, "releases", None) != 2:
            raise ConfigurationError(
                f"a sharpness-aware step releases two gradients of a batch, and the noise of the mechanism is "
                f"{declared!r}. Expected noise=SeveralReleases(multiplier, releases=2), which bills both."
            )
        try:
            return self._step.several(batch, self._between)
        finally:
            self._put_back()

    @torch.no_grad()
    def _between(self, number: int) -> None:
        """Moves the weights uphill after the first release, and back after the second."""
        if number > 0:
            self._put_back()
            return
        moved = [(p, p.grad) for p in self._step.model.parameters() if p.grad is not None]
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for _, g in moved]
        length = torch.stack([g.norm() for g in wide]).norm()
        self._own = [(p, p.detach().clone()) for p, _ in moved]
        for p, g in moved:
            p.add_(g * (self.radius / length.clamp(min=1e-12)))

    @torch.no_grad()
    def _put_back(self) -> None:
        for p, own in self._own:
            p.copy_(own)
        self._own = []
