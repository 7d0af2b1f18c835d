"""Rules, one family a file. Importing this package registers the families in this table."""

from privet.gradients.rules import (  # noqa: F401 - a handler is registered where its module is imported
    activation,
    attention,
    bag,
    bilinear,
    cell,
    convolution,
    distance,
    einsum,
    embedding,
    free,
    grouped,
    indexing,
    linear,
    normalization,
    products,
    recurrent,
)

__all__: list[str] = []
