"""Adaptive clipping: the clip norm follows a quantile of the gradient norms (Andrew et al., arXiv 1905.03871)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from privet.gradients.clipped_sum import ClippedSum
from privet.noise import GaussianNoise, noise_for
from privet.opacus.optimizers.optimizer import DPOptimizer
from privet.opacus.samplers import key_of

__all__ = ["AdaClipDPOptimizer"]


class AdaClipDPOptimizer(DPOptimizer):
    """A `DPOptimizer` that moves its clip norm after each step, by a noisy count of the gradients within it.

    Gradient and count are released together at the price of `noise_multiplier`: the gradient has the noise
    `(noise_multiplier^-2 - (2 unclipped_num_std)^-2)^(-1/2)` (theorem 1 of the paper). The count is centred, so that an
    example moves it by 1/2 as the theorem says, and divided by the expected batch size, which is public. Opacus counts
    by ones and divides by the number of examples drawn, and bills neither.

    Args:
        optimizer: steps on the private gradients.
        noise_multiplier: what a step is billed as. Below `2 * unclipped_num_std`.
        target_unclipped_quantile: the share of gradients that are to be within the clip norm.
        clipbound_learning_rate: how fast the clip norm moves.
        max_clipbound: its upper end.
        min_clipbound: its lower end.
        unclipped_num_std: the standard deviation of the noise on the count.
        max_grad_norm: where it begins.
        expected_batch_size: what sum and count are divided by.
        **kwargs: of `DPOptimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        target_unclipped_quantile: float,
        clipbound_learning_rate: float,
        max_clipbound: float,
        min_clipbound: float,
        unclipped_num_std: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            **kwargs,
        )
        if expected_batch_size is None:
            raise ValueError("adaptive clipping needs expected_batch_size, which the noisy count is divided by.")
        if max_clipbound <= min_clipbound:
            raise ValueError("max_clipbound must be larger than min_clipbound.")
        if noise_multiplier >= 2 * unclipped_num_std:
            raise ValueError(
                "noise_multiplier must be smaller than 2 * unclipped_num_std: the count would cost more than the step."
            )
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        self.max_clipbound = max_clipbound
        self.min_clipbound = min_clipbound
        self.unclipped_num_std = unclipped_num_std
        self._centred: Tensor | None = None  # secret: half of (within the clip norm - beyond it)
        self._noisy = 0.0
        self._count_noise: GaussianNoise | None = None

    @property
    def gradient_multiplier(self) -> float:
        """Returns what is left for the gradient of the noise that the step is billed as."""
        sigma = float(self.noise_multiplier)
        return float((sigma**-2 - (2.0 * self.unclipped_num_std) ** -2) ** -0.5) if sigma > 0.0 else 0.0

    @property
    def unclipped_num(self) -> float:
        """Returns the noisy count of the last step's gradients within the clip norm, given the expected batch size."""
        assert self.expected_batch_size is not None
        return self._noisy + self.expected_batch_size / 2.0

    def add_to_sum(self, clipped: ClippedSum, examples: Sequence[int]) -> None:
        """Adds a clipped sum to that of the step at hand, and its examples to the count."""
        norms = clipped.statistics["norms"].reshape(-1)
        within = (norms.isfinite() & (norms <= float(self.max_grad_norm) ** 2)).to(norms.dtype)
        centred = (within - 0.5).sum()
        self._centred = centred if self._centred is None else self._centred + centred
        super().add_to_sum(clipped, examples)

    def add_noise(self) -> None:
        """Bills the step, and releases the sum and the count with noise."""
        super().add_noise()
        if self._count_noise is None:
            key = key_of(self.generator, "noise")
            self._count_noise = GaussianNoise(noise_for("cpu", secure_mode=self.secure_mode, key=key))
        assert self._centred is not None
        count = ClippedSum({"count": self._centred.detach().cpu().view(1).clone()}, sensitivity=0.5)
        self._centred = None
        private = self._count_noise.release(count, multiplier=2.0 * self.unclipped_num_std, step=self._steps)
        self._noisy = float(private.values["count"])

    def update_max_grad_norm(self) -> None:
        """Moves the clip norm by the noisy count of the last step."""
        assert self.expected_batch_size is not None
        share = self.unclipped_num / self.expected_batch_size
        moved = float(self.max_grad_norm) * math.exp(
            -self.clipbound_learning_rate * (share - self.target_unclipped_quantile)
        )
        self.max_grad_norm = min(max(moved, self.min_clipbound), self.max_clipbound)

    def _after_clipping(self) -> bool:
        stepping = super()._after_clipping()
        if stepping:
            self.update_max_grad_norm()
        return stepping

    def zero_grad(self, set_to_none: bool = False) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        """Forgets gradients, and sum and count unless the last step was skipped."""
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._centred = None
