"""One step of a recurrent cell, taken apart: two linear operations, and what lies between them has no parameters.

A loop over time uses the same matrices at every step. Their uses are joined as the positions of one sequence, so that a
loop costs what one linear layer over the sequence costs. All formulas are those of the documentation of
torch.nn.LSTMCell, GRUCell and RNNCell.

Axes: B examples, I input features, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.rules.arguments import named
from privet.gradients.rules.registry import Call, handles

__all__: list[str] = []


def _arguments(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace | None:
    """Returns the arguments by name, or None if input or state are not (B, features) of data."""
    a = named(args, kwargs, input=None, hx=None, w_ih=None, w_hh=None, b_ih=None, b_hh=None)
    if a is None:
        return None
    data = (a.input, *a.hx) if isinstance(a.hx, (tuple, list)) else (a.input, a.hx)
    return a if all(isinstance(t, Tensor) and t.dim() == 2 and not call.is_root(t) for t in data) else None


def _entering(call: Call, a: SimpleNamespace, state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what enters the gates from the input and from the state."""
    return call.again(F.linear, a.input, a.w_ih, a.b_ih), call.again(F.linear, state, a.w_hh, a.b_hh)


@handles(torch.lstm_cell, structural=True)
def _lstm_cell(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = _arguments(call, args, kwargs)
    if a is None:
        return NotImplemented
    state, memory = a.hx
    from_input, from_state = _entering(call, a, state)
    enter, keep, new, out = (from_input + from_state).chunk(4, 1)
    memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
    return out.sigmoid() * memory.tanh(), memory


@handles(torch.gru_cell, structural=True)
def _gru_cell(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = _arguments(call, args, kwargs)
    if a is None:
        return NotImplemented
    of_input, of_state = (t.chunk(3, 1) for t in _entering(call, a, a.hx))
    reset, update = ((i + h).sigmoid() for i, h in zip(of_input[:2], of_state[:2], strict=True))
    new = (of_input[2] + reset * of_state[2]).tanh()
    return new + update * (a.hx - new)


@handles(torch.rnn_tanh_cell, torch.rnn_relu_cell, structural=True)
def _rnn_cell(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = _arguments(call, args, kwargs)
    if a is None:
        return NotImplemented
    from_input, from_state = _entering(call, a, a.hx)
    return (from_input + from_state).tanh() if func is torch.rnn_tanh_cell else (from_input + from_state).relu()
