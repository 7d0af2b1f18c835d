"""Recurrent cells run over a whole sequence in plain tensor code, forward and back, without any weight gradient.

The backward of a cell gives what the rules need: two gradients at the gates, one where the input enters them and one
where the state enters them. In the LSTM and the plain cell the two are equal. In the GRU they differ, because the reset
gate lies between the state and the candidate. All formulas are those of the documentation of torch.nn.LSTM, GRU and
RNN.

A sequence is a loop over its steps, and small tensors make most of its time the calls themselves. So every step writes
into memory that was taken for the whole sequence, and the number of calls in a step is kept small.

In packed data the examples are sorted by length, the longest first, and each step has those that are that long. So a
step works on the first rows of whatever has a row for each example.

Axes: T steps, B examples, H hidden features, P projected features (P = H without a projection), K gates; R are the
leading axes (T, B), or of packed data (N,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from privet.gradients.rules.pool import scratch

__all__ = ["CELLS", "Cell", "Gradients", "Run", "Steps", "Weights"]

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters that the state meets, as plain values."""

    hidden: Tensor  # (K H, P)
    bias: Tensor | None  # (K H,)
    projection: Tensor | None = None  # (P, H)


@dataclass(frozen=True, eq=False)
class Steps:
    """The order of the steps, and how many of the examples each has."""

    count: int  # T
    examples: int  # B
    reverse: bool
    sizes: tuple[int, ...] | None = None  # of packed data

    @property
    def forward(self) -> range:
        """Returns the steps in the order in which the run takes them."""
        return range(self.count - 1, -1, -1) if self.reverse else range(self.count)

    @property
    def backward(self) -> range:
        """Returns the steps in the order in which the backward takes them."""
        return self.forward[::-1]

    @cached_property
    def _held(self) -> Tensor:  # (N,)
        """Returns the places in (T, B) that packed data have."""
        return (torch.arange(self.examples) < torch.tensor(self.sizes).unsqueeze(1)).flatten().nonzero().squeeze(1)

    def of(self, rows: Tensor) -> Sequence[Tensor]:  # R... -> T of (B_t, ...)
        """Returns the rows of each step."""
        return rows.unbind(0) if self.sizes is None else torch.split(rows, list(self.sizes))

    def among(self, states: Tensor) -> Sequence[Tensor]:  # (T, B, P) -> T of (B_t, P)
        """Returns the states of the examples that each step has."""
        parts = states.unbind(0)
        return parts if self.sizes is None else [part[:n] for part, n in zip(parts, self.sizes, strict=True)]

    def carried(self, state: Tensor) -> Sequence[Tensor]:  # (B, P) -> T of (B_t, P)
        """Returns the part of what is carried from step to step that each step reads and writes."""
        return [state] * self.count if self.sizes is None else [state[:n] for n in self.sizes]

    def rows(self, states: Tensor) -> Tensor:  # (T, B, P) -> R...
        """Returns states as the data lie."""
        return states if self.sizes is None else states.flatten(0, 1).index_select(0, self._held.to(states.device))

    def last(self, outputs: Tensor) -> Tensor:  # (T, B, P) -> (B, P)
        """Returns the state after each example's own last step, in the order in which the run takes them."""
        if self.reverse or self.sizes is None:
            return outputs[0 if self.reverse else -1]
        lengths = (torch.tensor(self.sizes).unsqueeze(1) > torch.arange(self.examples)).sum(0)
        return outputs[lengths.to(outputs.device) - 1, torch.arange(self.examples, device=outputs.device)]

    def states(self, first: Tensor) -> Tensor:  # (B, P) -> (T + 1, B, P)
        """Returns memory for all states with the first state in it: at the start, or at the end if time runs backward.

        Backward in packed data, each example has its first state behind its own last step.
        """
        states = scratch((self.count + 1, *first.shape), first)
        if self.reverse and self.sizes is not None:
            states.copy_(first)
        else:
            states[-1 if self.reverse else 0].copy_(first)
        return states


@dataclass(frozen=True, eq=False)
class Run:
    """One run over a sequence, and what its backward needs.

    All states lie in one buffer, the first state included. The states before and after each step are then two views of
    it, and no copies.
    """

    states: Tensor  # (T + 1, B, P), in the order of time
    kept: tuple[Tensor, ...]
    steps: Steps

    @property
    def outputs(self) -> Tensor:  # (T, B, P)
        """Returns the state after each step."""
        return self.states[:-1] if self.steps.reverse else self.states[1:]

    @property
    def before(self) -> Tensor:  # (T, B, P)
        """Returns the state before each step."""
        return self.states[1:] if self.steps.reverse else self.states[:-1]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What the backward of a run gives."""

    inputs: Tensor  # (R..., K H): at the gates, as the input enters them
    hidden: Tensor  # (R..., K H): at the gates, as the state enters them
    first: tuple[Tensor, ...]  # of the first state, and of the first memory of an LSTM
    outputs: Tensor | None = None  # (R..., P): at the projection's output


class Cell(ABC):
    """One kind of cell."""

    gates: ClassVar[int]
    memory: ClassVar[bool] = False

    @abstractmethod
    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, steps: Steps) -> Run:
        """Runs the cell, and returns the run.

        The inputs (R..., K H) already went through their own matrix and bias, for all steps at once.
        """

    @abstractmethod
    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        """Returns the gradients for those of all states (R..., P), and of the last state and memory."""


class _Plain(Cell):
    """`h = f(x + W h + b)` for tanh or ReLU."""

    gates = 1

    def __init__(self, activation: Any) -> None:
        self._activate = activation
        self._bounded = activation is torch.tanh_  # its slope is that of tanh, else that of ReLU

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, steps: Steps) -> Run:
        run = Run(steps.states(first[0].to(inputs.dtype)), (), steps)
        sums = steps.of(inputs if weights.bias is None else inputs + weights.bias)
        matrix = weights.hidden.t()
        before, outputs = steps.among(run.before), steps.among(run.outputs)
        for t in steps.forward:
            self._activate(torch.addmm(sums[t], before[t], matrix, out=outputs[t]))
        return run

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        steps, gates, state = run.steps, scratch(outputs.shape, outputs), last[0].clone()  # the loop writes into it
        lists = (steps.of(gates), steps.of(outputs), steps.among(run.outputs), steps.carried(state))
        at_gates, given, reached, carried = lists
        for t in steps.backward:
            gradient = carried[t] + given[t]
            if self._bounded:
                _tanh_backward(gradient, reached[t], grad_input=at_gates[t])
            else:
                torch.mul(gradient, reached[t] > 0, out=at_gates[t])
            torch.mm(at_gates[t], weights.hidden, out=carried[t])
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

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, steps: Steps) -> Run:
        rows, width = inputs.shape[:-1], inputs.shape[-1]
        size = width // 4
        z = scratch(inputs.shape, inputs)
        if weights.bias is None:
            z.copy_(inputs)
        else:
            torch.add(inputs, weights.bias, out=z)
        by_gate = z.view(*rows, 4, size)
        by_gate[..., 2, :].mul_(2)  # a_g has two parts, one of the input and one of the state: both are doubled
        matrix = weights.hidden.view(4, size, -1) * inputs.new_tensor([1, 1, 2, 1]).view(4, 1, 1)
        matrix = matrix.view(width, -1).t().contiguous()
        memory = steps.states(first[1].to(z.dtype))
        squashed = scratch((*rows, size), z)
        run = Run(steps.states(first[0].to(z.dtype)), (z, memory, squashed), steps)
        memories = Run(memory, (), steps)
        projected = scratch((*rows, size), z) if weights.projection is not None else None
        shown = steps.among(run.outputs) if projected is None else steps.of(projected)
        gates = [steps.of(g) for g in by_gate.unbind(-2)]
        states, olds, news, after = map(steps.among, (run.before, memories.before, memories.outputs, run.outputs))
        zs, tanhs = steps.of(z), steps.of(squashed)
        for t in steps.forward:
            zs[t].addmm_(states[t], matrix).sigmoid_()
            new = torch.mul(gates[1][t], olds[t], out=news[t])
            new.addcmul_(gates[0][t], gates[2][t], value=2).sub_(gates[0][t])  # + i (2 s - 1)
            torch.mul(torch.tanh(new, out=tanhs[t]), gates[3][t], out=shown[t])
            if weights.projection is not None:
                torch.mm(shown[t], weights.projection.t(), out=after[t])
        return run if projected is None else Run(run.states, (*run.kept, projected), steps)

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        z, memory, squashed = run.kept[:3]
        steps, rows, width = run.steps, z.shape[:-1], z.shape[-1]
        size = width // 4
        by_gate, d = z.view(*rows, 4, size), scratch(z.shape, z)
        d_by_gate = d.view(*rows, 4, size)
        # g = 2 s - 1, from what the forward kept.
        signed = torch.mul(by_gate[..., 2, :], 2, out=scratch(squashed.shape, z)).sub_(1)
        # One call of the sigmoid's backward serves all four gates. At g it gives s (1 - s) times what comes in: that
        # is a quarter of the gradient. The loop leaves it so. The matrix makes up for it where the gradient goes on
        # to the state before, and the last line does so for all steps at once.
        matrix = (weights.hidden.view(4, size, -1) * z.new_tensor([1, 1, 4, 1]).view(4, 1, 1)).view(width, -1)
        inp, forget, _, out = (steps.of(g) for g in by_gate.unbind(-2))
        d_inp, d_forget, d_cand, d_out = (steps.of(g) for g in d_by_gate.unbind(-2))
        at_outputs = scratch(outputs.shape, z)
        zs, ds, tanhs, signs, given, reached = map(steps.of, (z, d, squashed, signed, outputs, at_outputs))
        olds = steps.among(Run(memory, (), steps).before)
        d_state, d_memory = last[0].clone(), last[1].clone()  # clones: the loop writes into them
        d_states, d_memories, parts = map(steps.carried, (d_state, d_memory, torch.empty_like(d_memory)))
        for t in steps.backward:
            part, carried = parts[t], d_memories[t]
            d_shown = torch.add(given[t], d_states[t], out=reached[t])
            if weights.projection is not None:
                d_shown = d_shown @ weights.projection
            torch.mul(d_shown, out[t], out=part)
            _tanh_backward(part, tanhs[t], grad_input=part)
            carried.add_(part)  # the memory reaches the output at once, and the steps after through `forget`
            torch.mul(d_shown, tanhs[t], out=d_out[t])
            torch.mul(carried, signs[t], out=d_inp[t])
            torch.mul(carried, olds[t], out=d_forget[t])
            torch.mul(carried, inp[t], out=d_cand[t])
            _sigmoid_backward(ds[t], zs[t], grad_input=ds[t])
            carried.mul_(forget[t])
            torch.mm(ds[t], matrix, out=d_states[t])
        d_by_gate[..., 2, :].mul_(4)
        return Gradients(d, d, (d_state, d_memory), at_outputs)


class _GRU(Cell):
    """The gates are r and z, and the candidate is n, in this order.

        r, z = sigmoid(x_r + s_r), sigmoid(x_z + s_z);  n = tanh(x_n + r s_n);  h' = (1 - z) n + z h

    x is the input's part and s is the state's part of each sum. Because r stands before s_n, the gradients of the two
    parts of n differ.
    """

    gates = 3

    def forward(self, inputs: Tensor, first: tuple[Tensor, ...], weights: Weights, steps: Steps) -> Run:
        size = inputs.shape[-1] // 3
        run = Run(steps.states(first[0].to(inputs.dtype)), (), steps)
        gates = scratch(inputs.shape, inputs).copy_(inputs)
        candidates = scratch((*inputs.shape[:-1], size), inputs)
        matrix = weights.hidden.t()
        before, outputs = steps.among(run.before), steps.among(run.outputs)
        by_step, kept = steps.of(gates), steps.of(candidates)
        for t in steps.forward:
            met = before[t] @ matrix if weights.bias is None else torch.addmm(weights.bias, before[t], matrix)
            opened = by_step[t][:, : 2 * size].add_(met[:, : 2 * size]).sigmoid_()
            kept[t].copy_(met[:, 2 * size :])  # s_n, which the gradient of r needs
            new = by_step[t][:, 2 * size :].addcmul_(opened[:, :size], kept[t]).tanh_()
            torch.lerp(new, before[t], opened[:, size:], out=outputs[t])
        return Run(run.states, (gates, candidates), steps)

    def backward(self, run: Run, weights: Weights, outputs: Tensor, last: tuple[Tensor, ...]) -> Gradients:
        (gates, candidates), steps = run.kept, run.steps
        size = candidates.shape[-1]
        d_inputs, d_hidden = scratch(gates.shape, gates), scratch(gates.shape, gates)
        state = last[0].clone()  # the loop writes into it
        ds, hs, by_step, kept, given = map(steps.of, (d_inputs, d_hidden, gates, candidates, outputs))
        before, carried = steps.among(run.before), steps.carried(state)
        for t in steps.backward:
            gradient = carried[t] + given[t]
            reset, update, new = torch.split(by_step[t], size, dim=1)
            d, h = ds[t], hs[t]
            d_new = gradient * (1 - update)
            _tanh_backward(d_new, new, grad_input=d_new)
            d[:, 2 * size :] = d_new
            torch.mul(d_new, kept[t], out=d[:, :size])
            torch.mul(gradient, before[t] - new, out=d[:, size : 2 * size])
            opened = d[:, : 2 * size]
            _sigmoid_backward(opened, by_step[t][:, : 2 * size], grad_input=opened)
            h[:, : 2 * size] = opened
            torch.mul(d_new, reset, out=h[:, 2 * size :])
            torch.addmm(gradient * update, h, weights.hidden, out=carried[t])
        return Gradients(d_inputs, d_hidden, (state,))


CELLS: dict[str, Cell] = {
    "lstm": _LSTM(),
    "gru": _GRU(),
    "rnn_tanh": _Plain(torch.tanh_),
    "rnn_relu": _Plain(torch.relu_),
}
