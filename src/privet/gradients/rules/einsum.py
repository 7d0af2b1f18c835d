"""`einsum` and batched products of data with one parameter, as the linear operations that they are.

Every letter of the parameter is contracted with the data, or comes out. Then the data are brought to (..., contracted)
and the parameter to a matrix (out, contracted), both by permutations, which change no norm. A letter that data,
parameter and result share is no linear operation of a matrix, and is left to vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.rules.registry import Call, handles

__all__: list[str] = []


@handles(torch.einsum, structural=True)
def _einsum(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        return NotImplemented
    operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    letters = _letters(args[0], operands)
    if letters is None or sum(map(call.is_root, operands)) != 1:
        return NotImplemented
    place = next(i for i, operand in enumerate(operands) if call.is_root(operand))
    (of_data, data), (of_root, root) = (letters[1 - place], operands[1 - place]), (letters[place], operands[place])
    result = letters[2]
    rest = [each for each in of_data if each not in of_root]
    contracted = [each for each in of_root if each in of_data]
    outs = [each for each in of_root if each not in of_data]
    if any(data.shape[of_data.index(each)] != root.shape[of_root.index(each)] for each in contracted):
        return NotImplemented  # an axis of one entry stands for all
    if set(contracted) & set(result) or set(rest + outs) != set(result) or not contracted or rest[:1] != [of_data[0]]:
        return NotImplemented
    features = math.prod(root.shape[of_root.index(each)] for each in contracted)
    matrix = call.again(torch.permute, root, [of_root.index(each) for each in (*outs, *contracted)])
    matrix = call.again(Tensor.reshape, matrix, (-1, features))
    laid = data.permute([of_data.index(each) for each in (*rest, *contracted)])
    product = call.again(F.linear, laid.reshape(*laid.shape[: len(rest)], features), matrix)
    product = product.unflatten(-1, [root.shape[of_root.index(each)] for each in outs] or [1])
    product = product if outs else product.squeeze(-1)
    return product.permute([(*rest, *outs).index(each) for each in result])


def _letters(equation: str, operands: Sequence[Any]) -> tuple[str, str, str] | None:
    """Returns the letters of two operands and of the result, or None if the equation is of another kind."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(operands) != 2 or len(letters) != 2 or not all(isinstance(t, Tensor) for t in operands):
        return None
    if not arrow:  # letters that occur once, in the order of the alphabet
        result = "".join(sorted(each for each in set(terms) - {","} if terms.count(each) == 1))
    plain = all(term.isalpha() and len(set(term)) == len(term) for term in letters) and (result.isalpha() or not result)
    if not plain or any(len(term) != t.dim() for term, t in zip(letters, operands, strict=True)):
        return None
    return letters[0], letters[1], result
