"""Recurrent cells run over a whole sequence in plain tensor code, forward and back, without any weight gradient.

The backward of a cell gives what the rules need: two gradients at the gates, one where the input enters them and one
where the state enters them. In the LSTM and the plain cell the two are equal. In the GRU they differ, because the reset
gate lies between the state and the candidate. All formulas are those of the documentation of torch.nn.LSTM, GRU and
RNN.

A sequence is a loop over its steps, and small tensors make most of its time the calls themselves. So every step writes
into memory that was taken for the whole sequence, and the number of calls in a step is kept small.

Axes: T steps, B examples, H hidden features, P projected features (P = H without a projection), K gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from privet.gradients.rules.pool import scratch

__all__ = ["CELLS", "Cell", "Gradients", "Run", "Weights"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters that the state meets, as plain values."""

    hidden: Tensor  # (K H, P)
    bias: Tensor | None  # (K H,)
    projection: Tensor | None = None  # (P, H)


@dataclass(frozen=True, eq=False)
class Run:
    """One run over a sequence, and what its backward needs.

    All states lie in one buffer, the first state included. The states before and after each step are then two views of
    it, and no copies.
    """

    states: Tensor  # (T + 1, B, P), in the order of time
    kept: tuple[Tensor, ...]
    reverse: bool

    @property
    def outputs(self) -> Tensor:  # (T, B, P)
        """Returns the state after each step."""
        return self.states[:-1] if self.reverse else self.states[1:]

    @property
    def before(self) -> Tensor:  # (T, B, P)
        """Returns the state before each step."""
        return self.states[1:] if self.reverse else self.states[:-1]

    @property
    def last(self) -> int:
        """Returns the index of the step that comes last in time order."""
        return 0 if self.reverse else len(self.states) - 2


@dataclass(frozen=True, eq=False)
class Gradients:
    """What the backward of a run gives."""

    inputs: Tensor  # (T, B, K H): at the gates, as the input enters them
    hidden: Tensor  # (T, B, K H): at the gates, as the state enters them
    first: tuple[Tensor, ...]  # of the first state, and of the first memory of an LSTM
    outputs: Tensor | None = None  # (T, B, P): at the projection's output


def _steps(count: int, *, reverse: bool) -> range:
    return range(count - 1, -1, -1) if reverse else range(count)


def _states(inputs: Tensor, first: Tensor, *, reverse: bool) -> Tensor:  # (T, B, K H), (B, P) -> (T + 1, B, P)
    """Returns memory for all states with the first state in it: at the start, or at the end if time runs backward."""
    states = scratch((inputs.shape[0] + 1, *first.shape), inputs)
    states[-1 if reverse else 0].copy_(first)
    return states


class Cell(ABC):
    """One kind of cell."""

    gates: ClassVar[int]
    memory: ClassVar[bool] = False

    @abstractmethod
    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, *, reverse: bool) -> Run:
        """Runs the cell, and returns the run.

        The inputs (T, B, K H) already went through their own matrix and bias, for all steps at once.
        """

    @abstractmethod
    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        """Returns the gradients for those of all states (T, B, P), and of the last state and memory."""


class _Plain(Cell):
    """`h = f(x + W h + b)` for tanh or ReLU."""

    gates = 1

    def __init__(self, activation: Any) -> None:
        self._activate = activation
        self._bounded = activation is torch.tanh_  # its slope is that of tanh, else that of ReLU

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, *, reverse: bool) -> Run:
        run = Run(_states(inputs, first[0], reverse=reverse), (), reverse)
        sums = inputs if weights.bias is None else inputs + weights.bias
        matrix = weights.hidden.t()
        before, outputs = run.before.unbind(0), run.outputs.unbind(0)
        for t in _steps(len(inputs), reverse=reverse):
            self._activate(torch.addmm(sums[t], before[t], matrix, out=outputs[t]))
        return run

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        gates = scratch(outputs.shape, outputs)
        state = last[0]
        for t in _steps(len(outputs), reverse=not run.reverse):
            gradient = state + outputs[t]
            reached = run.outputs[t]
            if self._bounded:
                _tanh_backward(gradient, reached, grad_input=gates[t])
            else:
                torch.mul(gradient, reached > 0, out=gates[t])
            state = gates[t] @ weights.hidden
        return Gradients(gates, gates, (state,))


class _LSTM(Cell):
    """The gates are i, f, g and o, in this order; g is the candidate.

        i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g);  c' = f c + i g;  h' = o tanh(c')

    One call for all four gates is faster than two calls. It is possible because tanh(a) = 2 sigmoid(2 a) - 1. So the
    code doubles a_g, takes one sigmoid of all gates, and keeps s = sigmoid(2 a_g) in the place of g. Whatever uses g
    then uses 2 s - 1:

        i g  = 2 i s - i            (forward)
        dg/da_g = 1 - g^2 = 4 s (1 - s), which is four times the slope of the sigmoid at 2 a_g   (backward)
    """

    gates = 4
    memory = True

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, *, reverse: bool) -> Run:
        steps, examples, width = inputs.shape
        size = width // 4
        z = scratch(inputs.shape, inputs)
        if weights.bias is None:
            z.copy_(inputs)
        else:
            torch.add(inputs, weights.bias, out=z)
        by_gate = z.view(steps, examples, 4, size)
        by_gate[:, :, 2].mul_(2)  # a_g has two parts, one of the input and one of the state: both are doubled
        matrix = weights.hidden.view(4, size, -1) * inputs.new_tensor([1, 1, 2, 1]).view(4, 1, 1)
        matrix = matrix.view(width, -1).t().contiguous()
        memory = _states(z, first[1], reverse=reverse)
        squashed = scratch((steps, examples, size), z)
        run = Run(_states(z, first[0], reverse=reverse), (z, memory, squashed), reverse)
        memories = Run(memory, (), reverse)
        shown = run.outputs if weights.projection is None else scratch((steps, examples, size), z)
        gates = [g.unbind(0) for g in by_gate.unbind(2)]
        lists = (t.unbind(0) for t in (z, run.before, memories.before, memories.outputs, squashed, shown))
        zs, states, olds, news, tanhs, results = lists
        for t in _steps(steps, reverse=reverse):
            zs[t].addmm_(states[t], matrix).sigmoid_()
            new = torch.mul(gates[1][t], olds[t], out=news[t])
            new.addcmul_(gates[0][t], gates[2][t], value=2).sub_(gates[0][t])  # + i (2 s - 1)
            torch.mul(torch.tanh(new, out=tanhs[t]), gates[3][t], out=results[t])
            if weights.projection is not None:
                torch.mm(results[t], weights.projection.t(), out=run.outputs[t])
        return run if weights.projection is None else Run(run.states, (*run.kept, shown), reverse)

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        z, memory, squashed = run.kept[:3]
        steps, examples, width = z.shape
        size = width // 4
        by_gate, d = z.view(steps, examples, 4, size), scratch(z.shape, z)
        d_by_gate = d.view(steps, examples, 4, size)
        # g = 2 s - 1, from what the forward kept.
        signed = torch.mul(by_gate[:, :, 2], 2, out=scratch(squashed.shape, z)).sub_(1)
        # One call of the sigmoid's backward serves all four gates. At g it gives s (1 - s) times what comes in: that
        # is a quarter of the gradient. The loop leaves it so. The matrix makes up for it where the gradient goes on
        # to the state before, and the last line does so for all steps at once.
        matrix = (weights.hidden.view(4, size, -1) * z.new_tensor([1, 1, 4, 1]).view(4, 1, 1)).view(width, -1)
        inp, forget, _, out = (g.unbind(0) for g in by_gate.unbind(2))
        d_inp, d_forget, d_cand, d_out = (g.unbind(0) for g in d_by_gate.unbind(2))
        lists = (t.unbind(0) for t in (z, d, squashed, signed, Run(memory, (), run.reverse).before))
        zs, ds, tanhs, signs, olds = lists
        at_outputs = scratch(outputs.shape, z)
        d_state, d_memory = last[0], last[1].clone()  # a clone: the loop writes into it
        part = torch.empty_like(d_memory)
        for t in _steps(steps, reverse=not run.reverse):
            d_shown = torch.add(outputs[t], d_state, out=at_outputs[t])
            if weights.projection is not None:
                d_shown = d_shown @ weights.projection
            torch.mul(d_shown, out[t], out=part)
            _tanh_backward(part, tanhs[t], grad_input=part)
            d_memory.add_(part)  # the memory reaches the output at once, and the steps after through `forget`
            torch.mul(d_shown, tanhs[t], out=d_out[t])
            torch.mul(d_memory, signs[t], out=d_inp[t])
            torch.mul(d_memory, olds[t], out=d_forget[t])
            torch.mul(d_memory, inp[t], out=d_cand[t])
            _sigmoid_backward(ds[t], zs[t], grad_input=ds[t])
            d_memory.mul_(forget[t])
            d_state = ds[t] @ matrix
        d_by_gate[:, :, 2].mul_(4)
        return Gradients(d, d, (d_state, d_memory), at_outputs)


class _GRU(Cell):
    """The gates are r and z, and the candidate is n, in this order.

        r, z = sigmoid(x_r + s_r), sigmoid(x_z + s_z);  n = tanh(x_n + r s_n);  h' = (1 - z) n + z h

    x is the input's part and s is the state's part of each sum. Because r stands before s_n, the gradients of the two
    parts of n differ.
    """

    gates = 3

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, *, reverse: bool) -> Run:
        steps, examples, width = inputs.shape
        size = width // 3
        run = Run(_states(inputs, first[0], reverse=reverse), (), reverse)
        gates = scratch(inputs.shape, inputs).copy_(inputs)
        candidates = scratch((steps, examples, size), inputs)
        matrix = weights.hidden.t()
        before, outputs = run.before.unbind(0), run.outputs.unbind(0)
        for t in _steps(steps, reverse=reverse):
            met = before[t] @ matrix if weights.bias is None else torch.addmm(weights.bias, before[t], matrix)
            opened = gates[t, :, : 2 * size].add_(met[:, : 2 * size]).sigmoid_()
            candidates[t].copy_(met[:, 2 * size :])  # s_n, which the gradient of r needs
            new = gates[t, :, 2 * size :].addcmul_(opened[:, :size], candidates[t]).tanh_()
            torch.lerp(new, before[t], opened[:, size:], out=outputs[t])
        return Run(run.states, (gates, candidates), reverse)

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        gates, candidates = run.kept
        size = candidates.shape[2]
        d_inputs, d_hidden = scratch(gates.shape, gates), scratch(gates.shape, gates)
        state = last[0]
        for t in _steps(len(gates), reverse=not run.reverse):
            gradient = state + outputs[t]
            reset, update, new = torch.split(gates[t], size, dim=1)
            d, h = d_inputs[t], d_hidden[t]
            d_new = gradient * (1 - update)
            _tanh_backward(d_new, new, grad_input=d_new)
            d[:, 2 * size :] = d_new
            torch.mul(d_new, candidates[t], out=d[:, :size])
            torch.mul(gradient, run.before[t] - new, out=d[:, size : 2 * size])
            opened = d[:, : 2 * size]
            _sigmoid_backward(opened, gates[t, :, : 2 * size], grad_input=opened)
            h[:, : 2 * size] = opened
            torch.mul(d_new, reset, out=h[:, 2 * size :])
            state = torch.addmm(gradient * update, h, weights.hidden)
        return Gradients(d_inputs, d_hidden, (state,))


CELLS: dict[str, Cell] = {
    "lstm": _LSTM(),
    "gru": _GRU(),
    "rnn_tanh": _Plain(torch.tanh_),
    "rnn_relu": _Plain(torch.relu_),
}
