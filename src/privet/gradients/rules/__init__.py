"""Rules, one family a file. Importing this package registers all of them."""

from privet.gradients.rules import convolution, embedding, free, linear, normalization

__all__ = ["convolution", "embedding", "free", "linear", "normalization"]
