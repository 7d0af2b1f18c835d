"""Rules, one family a file. Importing this package registers all of them."""

from privet.gradients.rules import attention, convolution, embedding, free, linear, normalization, recurrent

__all__ = ["attention", "convolution", "embedding", "free", "linear", "normalization", "recurrent"]
