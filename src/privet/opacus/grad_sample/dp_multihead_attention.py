"""The grad sampler of the sequence bias, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_sequence_bias_grad_sample

__all__ = ["compute_sequence_bias_grad_sample"]
