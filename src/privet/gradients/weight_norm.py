"""Weight norm, `W = g v / |v|`: the norms of what goes back to v and g, for all rows at once.

A gradient G of W goes back to g as `G . v / |v|`, and to v as what of `G g / |v|` is perpendicular to v, both for each
slice of W along one axis. So the two norms need two numbers of each slice, `|G|` and `G . v / |v|`, and no gradient of
v is formed. (Salimans and Kingma, arXiv 1602.07868, equation 3.)

Axes: R rows, S slices, D entries of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from privet.gradients.derived import Derivation
from privet.gradients.precision import product_error
from privet.gradients.rows import padded, row_norms, wide

__all__ = ["weight_norm_norms"]

_NAME = "WeightNormInterfaceBackward0"


def weight_norm_norms(
    derivation: Derivation, parameters: Sequence[Tensor], rows: Tensor
) -> list[Tensor] | None:  # (R, *derived) -> (R,) each
    """Returns the squared norms of each parameter's gradients, or None if the tensor is no weight norm of two of them.

    Args:
        derivation: of the tensor.
        parameters: v and g, in any order.
        rows: gradients of the tensor.

    Guarantees:
        The norms are padded for the rounding of the way back. `|G|^2 - (G . v / |v|)^2` may cancel, and what rounding
        may have taken from it is added as well.
    """
    node: Any = derivation.tensor.grad_fn
    if node is None or node.name() != _NAME or len(parameters) != 2:
        return None
    inputs = [getattr(each, "variable", None) for each, _ in node.next_functions]
    if any(not any(p is each for each in inputs) for p in parameters):
        return None  # v or g is itself derived from parameters
    v, g, axis = node._saved_v, node._saved_g, node._saved_dim % rows[0].dim()  # noqa: SLF001 - as torch documents
    strides = rows.stride()
    others = sorted((i for i in range(1, rows.dim()) if i != axis + 1), key=lambda i: -strides[i])
    flat = wide(rows.permute(0, axis + 1, *others).reshape(len(rows), v.shape[axis], -1))  # (R, S, D)
    direction = v.to(flat.dtype).permute(axis, *(i - 1 for i in others)).reshape(flat.shape[1:])
    lengths = torch.linalg.vector_norm(direction, dim=1)
    direction = direction / lengths.unsqueeze(1)
    whole = row_norms(flat.flatten(0, 1)).view(len(rows), -1)
    along = torch.bmm(flat.transpose(0, 1), direction.unsqueeze(2)).squeeze(2).t()  # (R, S)
    error = product_error(flat.shape[2], flat.dtype, flat.device)
    across = (whole - along.square()).clamp(min=0.0) + 4.0 * error * whole
    scales = (g.reshape(-1).to(flat.dtype) / lengths).square()
    found = {
        id(inputs[0]): padded((across * scales).sum(1), (whole * scales).sum(1).sqrt(), error),
        id(inputs[1]): padded(row_norms(along), whole.sum(1).sqrt(), error),
    }
    return [found[id(p)] for p in parameters]
