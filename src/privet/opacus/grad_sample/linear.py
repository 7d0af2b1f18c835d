"""The grad sampler of linear layers, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_linear_grad_sample

__all__ = ["compute_linear_grad_sample"]
