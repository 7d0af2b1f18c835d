"""The grad sampler of RMS norms, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_rms_norm_grad_sample

__all__ = ["compute_rms_norm_grad_sample"]
