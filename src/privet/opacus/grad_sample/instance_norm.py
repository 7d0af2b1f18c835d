"""The grad sampler of instance norms, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_instance_norm_grad_sample

__all__ = ["compute_instance_norm_grad_sample"]
