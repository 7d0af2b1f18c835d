"""The grad sampler of layer norms, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_layer_norm_grad_sample

__all__ = ["compute_layer_norm_grad_sample"]
