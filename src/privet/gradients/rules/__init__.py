"""Rules, one family a file. Importing this package registers all of them."""

from privet.gradients.rules import convolution, free, linear

__all__ = ["convolution", "free", "linear"]
