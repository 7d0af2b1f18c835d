"""Adam whose second moment is corrected for the noise: DP-AdamBC.

The squares of noisy gradients are those of the gradients plus the variance of the noise, which is far larger, is the
same for all parameters, and is known. It is taken off again. (Tang, Shpilevskiy, Lecuyer, "DP-AdamBC: Your DP-Adam Is
Actually DP-SGD (Unless You Apply Bias Correction)", 2024, arXiv:2312.14334, algorithm 1.) That is post-processing of
what was released, so that nothing is billed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from privet._checks import check_at_least, check_positive, check_probability
from privet.errors import ConfigurationError, ProtocolError
from privet.training.guard import deviation_of

__all__ = ["AdamBC"]


class AdamBC(torch.optim.Optimizer):
    """Steps by `lr * m / sqrt(max(v - n, floor))`: Adam's corrected moments m and v, and the variance of the noise n.

    The variance is that of each released gradient: `(noise multiplier * sensitivity / expected batch size)^2`, which
    the private step knows and hands over with the gradient. Where it changes over the run (schedules of the noise, the
    clip norm or the rate, adaptive clipping), n is the same moving average of it that v is of squares.

    Args:
        params: what to train, as for any optimizer.
        lr: the learning rate. Steps are larger than Adam's where the noise dominates; try a tenth of Adam's.
        betas: of the two moments.
        floor: the least value of `v - n` (the paper's gamma'). None for one standard deviation of what v - n is by the
            noise alone: n times the square root of twice the sum of the squared weights of the moving average.
        eps: the square root of the least floor, for a run without noise.
        weight_decay: decoupled, as in AdamW.

    Raises:
        ConfigurationError: for options that are out of range.
        ProtocolError: by `step`, if a gradient is not one that a private step has released, or its noise is correlated
            over steps, so that its variance is not the same in every step. Nothing is changed then.

    Example:
        >>> import torch
        >>> from privet import AdamBC, Flat, Gaussian, Mechanism, Poisson, PrivateStep
        >>> model = torch.nn.Linear(4, 1)
        >>> step = PrivateStep(
        ...     model,
        ...     optimizer=AdamBC(model.parameters(), lr=1e-3),
        ...     mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.1), steps=4),
        ...     loss_per_example=lambda model, batch: model(batch[0]).square().sum(1),
        ... )
        >>> for batch in step.batches(torch.utils.data.TensorDataset(torch.randn(64, 4))):
        ...     losses = step(batch)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if check_probability(name, beta) == 1.0:
                raise ConfigurationError(f"{name} is 1, which forgets nothing and learns nothing. Expected less.")
        options = {
            "lr": check_at_least("lr", lr),
            "betas": betas,
            "floor": None if floor is None else check_at_least("floor", floor),
            "eps": check_positive("eps", eps),
            "weight_decay": check_at_least("weight_decay", weight_decay),
        }
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step by the gradients that were released."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        known = [deviation_of(gradient) for _, _, gradient in held]
        if None in known:
            raise ProtocolError(
                "AdamBC was given a gradient whose noise it does not know: one that no private step has released, or "
                "one with noise that is correlated over steps (BandMF, BLT, LambdaCGD). Expected gradients with "
                "independent Gaussian noise. Make the optimizer private, or use torch.optim.Adam. Nothing was changed."
            )
        for (group, p, gradient), deviation in zip(held, known, strict=True):
            assert deviation is not None
            self._move(group, p, gradient, deviation**2)
        return loss

    def _move(self, group: dict[str, Any], p: Tensor, gradient: Tensor, variance: float) -> None:
        (beta1, beta2), state = group["betas"], self.state[p]
        if not state:
            state["step"], state["noise"] = 0, 0.0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        state["noise"] += (1.0 - beta2) * (variance - state["noise"])
        state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        first, second = 1.0 - beta1 ** state["step"], 1.0 - beta2 ** state["step"]
        noise = state["noise"] / second
        floor = group["floor"]
        if floor is None:
            # The squares of noise have variance 2 n^2 each, and these are the weights that they are averaged with.
            floor = noise * math.sqrt(2.0 * (1.0 - beta2) * (2.0 - second) / ((1.0 + beta2) * second))
        spread = (state["exp_avg_sq"] / second).sub_(noise).clamp_(min=max(floor, group["eps"] ** 2)).sqrt_()
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / first)
