"""Rules, one family a file. Importing this package registers all of them."""

from privet.gradients.rules import free, linear

__all__ = ["free", "linear"]
