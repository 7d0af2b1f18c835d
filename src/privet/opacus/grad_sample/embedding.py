"""The grad sampler of embeddings, at Opacus's path."""

from privet.opacus.grad_sample.samplers import compute_grad_sample as compute_embedding_grad_sample

__all__ = ["compute_embedding_grad_sample"]
