"""The grad sampler of group norms, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_group_norm_grad_sample

__all__ = ["compute_group_norm_grad_sample"]
