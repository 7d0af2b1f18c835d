"""LSTM, GRU and plain recurrent layers, taken apart layer by layer and direction by direction.

Packed data (N, F) stay packed: each step is run for the examples that are that long, and the rows have owners that the
capture knows.

Axes as in `cells.py`. The input's matrix is a linear operation over all steps. The state's matrix is one too, with the
states before each step as its data; but these are known only after the run. So its use is declared first, as a *slot*:
an operation without data whose output, all zeros, the run takes as an input and gives the gradient at the gates. When
that gradient arrives, the states are there, and the slot's use is that of an ordinary linear operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.layout import Layout
from privet.gradients.rows import wide
from privet.gradients.rules.adjoint import refuse_twice
from privet.gradients.rules.arguments import named
from privet.gradients.rules.cells import CELLS, Cell, Run, Steps, Weights
from privet.gradients.rules.linear import Linear
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule

__all__ = ["Slot"]


class Slot(Operation):
    """The place where a sequence of states meets a matrix and a bias, step by step."""

    positionwise = True
    rules: Mapping[str, Rule] = Linear().rules

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self._zeros = like.new_zeros(()).expand(tuple(shape))
        self.states: Tensor | None = None  # as the gradient lies; set by the run

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns zeros."""
        return self._zeros

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns the states that met the matrix."""
        return (self.states,)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns nothing: there are no data."""
        return ()


@dataclass(eq=False)
class _Pass:
    """One layer in one direction."""

    cell: Cell
    weights: Weights
    hidden: Slot
    projected: Slot | None
    batch_first: bool
    steps: Steps

    def time_first(self, t: Tensor) -> Tensor:
        """Returns a view with the steps on axis 0; packed rows as they are."""
        return t.transpose(0, 1) if self.batch_first else t

    as_given = time_first


class _Recurrence(torch.autograd.Function):
    """Runs a pass. Inputs: of the gates, the slots' outputs, the first states. Outputs: all states, the last ones."""

    @staticmethod
    def forward(ctx: Any, job: _Pass, inputs: Tensor, slot: Tensor, second: Tensor | None, *first: Tensor) -> Any:
        del slot  # zeros; its gradient is what counts
        run = job.cell.forward(wide(job.time_first(inputs)), tuple(wide(f) for f in first), job.weights, job.steps)
        ctx.job, ctx.run, ctx.dtype, ctx.firsts = job, run, inputs.dtype, tuple(f.dtype for f in first)
        ctx.has_second = second is not None
        job.hidden.states = job.as_given(job.steps.rows(run.before))
        if job.projected is not None:
            job.projected.states = job.as_given(run.kept[-1])
        outputs = job.as_given(job.steps.rows(run.outputs))
        outputs = outputs.to(inputs.dtype, copy=job.steps.sizes is None, memory_format=torch.contiguous_format)
        ends = [run.outputs, Run(run.kept[1], (), job.steps).outputs] if job.cell.memory else [run.outputs]
        last = [job.steps.last(end).to(inputs.dtype, copy=True) for end in ends]
        return outputs, *last

    @staticmethod
    def backward(ctx: Any, outputs: Tensor, *last: Tensor) -> Any:
        refuse_twice("nn.LSTM, nn.GRU or nn.RNN", "Use nn.LSTMCell, nn.GRUCell or nn.RNNCell in a loop over the steps.")
        job: _Pass = ctx.job
        result = job.cell.backward(ctx.run, job.weights, wide(job.time_first(outputs)), tuple(wide(t) for t in last))
        inputs, hidden = (job.as_given(t).to(ctx.dtype) for t in (result.inputs, result.hidden))
        second = job.as_given(result.outputs) if ctx.has_second and result.outputs is not None else None
        return (None, inputs, hidden, second, *(g.to(d) for g, d in zip(result.first, ctx.firsts, strict=True)))


@dataclass(frozen=True)
class _Kind:
    """What all passes of one call share."""

    cell: Cell
    batch_first: bool
    layout: Layout
    sizes: tuple[int, ...] | None  # of the steps of packed data

    def steps(self, inputs: Tensor, first: Tensor, *, reverse: bool) -> Steps:  # (R..., K H), (B, P)
        """Returns the steps of one pass."""
        count = len(self.sizes) if self.sizes is not None else inputs.shape[1 if self.batch_first else 0]
        return Steps(count, len(first), reverse, self.sizes)


def _one_pass(
    call: Call, kind: _Kind, x: Tensor, parts: Sequence[Tensor | None], first: Sequence[Tensor], *, reverse: bool
) -> tuple[Tensor, ...]:
    """Returns all states of one layer in one direction, and the last ones."""
    w_input, w_hidden, b_input, b_hidden, w_projection = parts
    inputs = call.again(F.linear, x, w_input, b_input)
    values = [None if t is None else wide(t.as_subclass(Tensor).detach()) for t in (w_hidden, b_hidden, w_projection)]
    assert values[0] is not None
    weights = Weights(values[0], *values[1:])
    hidden = Slot(inputs.shape, weights.hidden)
    slot = _declared(call, hidden, {"weight": w_hidden, "bias": b_hidden}, kind.layout)
    projected, second = None, None
    if w_projection is not None:
        projected = Slot((*inputs.shape[:-1], w_projection.shape[0]), weights.hidden)
        second = _declared(call, projected, {"weight": w_projection}, kind.layout)
    steps = kind.steps(inputs, first[0], reverse=reverse)
    a_pass = _Pass(kind.cell, weights, hidden, projected, kind.batch_first, steps)
    return _Recurrence.apply(a_pass, inputs, slot, second, *first)  # type: ignore[no-any-return, no-untyped-call]


def _declared(call: Call, slot: Slot, roots: Mapping[str, Tensor | None], layout: Layout) -> Tensor:
    if any(call.is_root(root) for root in roots.values()):
        return call.apply(slot, (), roots, layout=layout)  # type: ignore[no-any-return]
    return slot.forward((), {})


@handles(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, structural=True)
def _recurrent(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cell = CELLS[func.__name__]
    a = _arguments(cell, args, kwargs)
    firsts = tuple(a.hx) if cell.memory else (a.hx,)
    call.require_alike(func.__name__, a.input, a.batch_sizes, firsts)
    sizes = None if a.batch_sizes is None else tuple(a.batch_sizes.tolist())
    kind = _Kind(cell, a.batch_first, call.layout(a.input), sizes)
    _check(call, func.__name__, a, [a.input, *firsts], kind.layout)
    directions = 2 if a.bidirectional else 1
    per_pass = len(a.params) // (a.num_layers * directions)
    x, lasts = a.input, []
    for layer in range(a.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            parts = _parts(a.params[k * per_pass : (k + 1) * per_pass], biases=a.has_biases)
            states, *last = _one_pass(call, kind, x, parts, [f[k] for f in firsts], reverse=direction == 1)
            outputs.append(states)
            lasts.append(last)
        x = call.lies_as(outputs[0] if directions == 1 else torch.cat(outputs, dim=-1), a.input)
        if a.dropout and a.train and layer < a.num_layers - 1:
            x = call.lies_as(_dropped(x, a.dropout, batch_first=a.batch_first), a.input)
    return x, *(torch.stack(tuple(group)) for group in zip(*lasts, strict=True))


_REST: dict[str, Any] = {
    "params": None,
    "has_biases": True,
    "num_layers": 1,
    "dropout": 0.0,
    "train": True,
    "bidirectional": False,
}


def _arguments(cell: Cell, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Returns the arguments of either form of the call; `batch_sizes` is None unless the data are packed."""
    place = 1 if cell.memory else 2  # a list of states, or of parameters, unless batch_sizes come before
    if "batch_sizes" in kwargs or (len(args) > place and isinstance(args[place], Tensor)):
        a = named(args, kwargs, input=None, batch_sizes=None, hx=None, **_REST)
        shape: dict[str, Any] = {"batch_first": False}
    else:
        a = named(args, kwargs, input=None, hx=None, **_REST, batch_first=False)
        shape = {"batch_sizes": None}
    if a is None or not isinstance(a.params, list | tuple):
        raise UnsupportedModelError(
            "a recurrent layer was called in another form than that of torch's own modules. Expected the arguments of "
            "torch.lstm, gru, rnn_tanh or rnn_relu, by place. Use nn.LSTM, nn.GRU or nn.RNN."
        )
    return SimpleNamespace(**vars(a), **shape)


def _dropped(x: Tensor, share: float, *, batch_first: bool) -> Tensor:
    """Returns `x` with the same entries dropped as torch's own function would drop, from the same random state."""
    if not batch_first:
        return F.dropout(x, share)
    return F.dropout(x.transpose(0, 1).contiguous(), share).transpose(0, 1)


def _parts(params: Sequence[Tensor], *, biases: bool) -> list[Tensor | None]:
    """Returns w_input, w_hidden, b_input, b_hidden and w_projection of one pass, None where there is none."""
    parts: list[Tensor | None] = [*params[:2], *(params[2:4] if biases else (None, None))]
    rest = params[4:] if biases else params[2:]
    return [*parts, rest[0] if rest else None]


def _check(call: Call, name: str, a: SimpleNamespace, data: Sequence[Tensor], layout: Layout) -> None:
    """Raises an error where the parts do not have examples of their own, or weights depend on the data."""
    names = ", ".join(call.label(p) for p in a.params if call.is_root(p))
    if any(call.is_root(t) for t in data) or layout is Layout.CONSTANT:
        raise UnsupportedModelError(
            f"{name} of {names} met an input or a first state without a batch axis. Expected both to have one. Expand "
            "a trainable first state over the batch before the call."
        )
    if any(p.requires_grad and not call.is_root(p) for p in a.params):
        raise UnsupportedModelError(f"{name} of {names} has weights that depend on the data. Expected parameters.")
