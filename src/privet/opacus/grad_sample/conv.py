"""The grad sampler of convolutions, at Opacus's path. Both of its names compute the same rows."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_conv_grad_sample
from privet.opacus.grad_sample.samplers import compute_grad_sample as convolution2d_backward_as_a_convolution

__all__ = ["compute_conv_grad_sample", "convolution2d_backward_as_a_convolution"]
