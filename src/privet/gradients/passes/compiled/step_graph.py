"""The clipped sum as one static graph: traced once for a shape, compiled as a whole, run for every batch after.

What is traced is all of [forward, backward, norms, weights, weighted sums] of one physical batch of fixed size, with
the parameters, the buffers, the batch and the mask of rows that only fill up as inputs. Noise, ledger and optimizer
stay outside: they happen once in a logical step, and in Python.

A graph holds for the situation that it was traced in. What is known to shape a graph is compared before every use, and
a new graph is traced where anything differs; what would make a graph wrong later is refused when it is traced:

    what the model or loss does                         what happens
    a branch on values of tensors, `.item()`            refused: a graph has no branches
    writes to a buffer, or a number to an attribute     refused: a graph would not
    leaves a tensor on a module                         refused if the next forward reads it
    Python's or NumPy's random numbers                  refused: they would be the same for ever
    torch's random numbers (dropout)                    fresh for every batch
    reads a number of its own that changes (a schedule) a new graph
    takes values past autograd (`.data`, `.numpy()`)    refused by a trial: other data and weights, graph against eager
    reads a number from elsewhere that changes          not seen: keep such numbers on a module, or in the batch
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from privet.batches.tree import taken_apart
from privet.errors import UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.undisturbed import undisturbed
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.passes.compiled.refusals import Written, explained, watched_forward
from privet.gradients.passes.compiled.situation import (
    form_of,
    kinds,
    plain_attributes,
    surroundings,
    tensor_attributes,
)
from privet.gradients.passes.one_pass import OnePass
from privet.gradients.passes.role import Losses
from privet.gradients.tracing import traced
from privet.gradients.use import Owner
from privet.gradients.weights import Policy, sensitivity_of, weights_of

__all__ = ["CompiledSum"]

_BACKEND = "inductor"
_KEPT = 8
"""Graphs kept; with more situations than these the oldest is traced again when it comes back."""
_HALF = frozenset({torch.float16, torch.bfloat16})

_Graph = Callable[[list[Tensor]], list[Tensor]]


@dataclass(eq=False)
class _Traced:
    """A graph, and what it holds for."""

    situation: Any
    policy: Policy
    names: tuple[str, ...]  # of the sums, in order
    graph: GraphModule
    run: _Graph  # the graph, compiled
    tried: bool = False  # on other data and weights
    ran: bool = False


class CompiledSum:
    """Takes one batch at a time through a compiled graph of `OnePass`.

    Args:
        capture: watches the forward while it is traced.
        module: the model and its loss.
    """

    def __init__(self, capture: Capture, module: nn.Module) -> None:
        self._capture = capture
        self._module = module
        self._eager = OnePass(capture)
        self._graphs: list[_Traced] = []
        self._traces = 0
        self._written = Written()

    def clipped_sum(
        self,
        losses: Losses,
        batch: Any,
        *,
        examples: int,
        parameters: Mapping[str, nn.Parameter],
        policy: Policy,
        absent: Tensor | None = None,  # (B,) bool
        owner: Owner | None = None,
    ) -> tuple[ClippedSum, Tensor]:  # and the losses, (B,)
        """Returns the clipped sum and the losses; see `SumOfBatch`.

        Raises:
            UnsupportedModelError: if the model or the loss cannot be a graph, with the reason.
        """
        if owner is not None:
            raise UnsupportedModelError(
                "the step is compiled, and the rows of the batch belong to users. Expected compile=False with them."
            )
        form = form_of(batch)
        tensors, rebuild = taken_apart(batch, lambda leaf: isinstance(leaf, Tensor))
        if absent is None:
            absent = torch.zeros(examples, dtype=torch.bool, device=next(iter(parameters.values())).device)
        inputs = [absent, *(t.detach().contiguous() for t in tensors)]
        state = [*self._module.parameters(), *self._module.buffers()]

        def whole(values: list[Tensor]) -> list[Tensor]:
            mask, *rest = values[: len(inputs)]
            total, found = self._eager.clipped_sum(
                losses, rebuild(rest), examples=examples, parameters=parameters, policy=policy, absent=mask
            )
            return [found, total.statistics["dropped"], total.statistics["norms"], *total.take().values()]

        sensitivity = sensitivity_of(policy)  # compared by itself: a policy of the user's own may be changed in place
        situation = (form, kinds([*inputs, *state]), tuple(parameters), sensitivity, self._outlook(absent.device))
        entry = self._known(situation, policy)
        if entry is None:
            entry = self._trace(whole, [*inputs, *state], situation, policy, tuple(parameters))
        if not entry.tried:
            entry.tried = self._try(entry, whole, inputs, state)
        found, dropped, norms, *sums = self._run(entry, [*inputs, *state])
        weights_of(policy, norms, absent)  # raises for a policy's wrong answers, which a graph cannot
        statistics = {"dropped": dropped, "norms": norms}
        return ClippedSum(dict(zip(entry.names, sums, strict=True)), sensitivity, statistics), found

    # -- which graph -------------------------------------------------------------------------------------------------

    def _outlook(self, device: torch.device) -> tuple[Any, ...]:
        """Returns what Python around the model can change in a forward."""
        tensors = tensor_attributes(self._module, but=self._written.places)
        held = tuple((place, id(t)) for place, t in tensors.items())
        return plain_attributes(self._module), held, surroundings(device), self._capture.channels_last

    def _known(self, situation: Any, policy: Policy) -> _Traced | None:
        for entry in self._graphs:
            if entry.situation == situation and entry.policy == policy:
                return entry
        return None

    def _trace(
        self, whole: _Graph, inputs: list[Tensor], situation: Any, policy: Policy, names: tuple[str, ...]
    ) -> _Traced:
        self._traces += 1
        if self._traces == _KEPT + 1:
            warnings.warn(
                f"compile=True has traced and compiled {self._traces} graphs. Expected few: each is for one clipping "
                "policy, one set of trainable parameters, one shape of batch, and one state of the numbers that "
                "modules hold. Let those change seldom, or train with compile=False.",
                stacklevel=2,
            )
        with undisturbed(self._module), watched_forward(self._module, self._written), explained(), traced():
            graph = make_fx(whole, tracing_mode="real")(inputs)
        self._written.refuse_read_first(graph)
        situation = (*situation[:-1], self._outlook(inputs[0].device))  # without what the forward writes
        run = torch.compile(graph, fullgraph=True, dynamic=False, backend=_BACKEND)
        entry = _Traced(situation, policy, names, graph, run)
        self._graphs = [*self._graphs[-_KEPT + 1 :], entry]
        return entry

    # -- one graph ---------------------------------------------------------------------------------------------------

    def _run(self, entry: _Traced, inputs: list[Tensor]) -> list[Tensor]:
        # A forward of another model that was interrupted may have left torch.compile switched to eager.
        with torch.compiler.set_stance("default"):
            if entry.ran:
                return self._as_run(entry.run, inputs)
            with explained():
                outputs = self._as_run(entry.run, inputs)
        entry.ran = True
        return outputs

    @staticmethod
    def _as_run(graph: _Graph, inputs: list[Tensor]) -> list[Tensor]:
        with (
            torch.no_grad(),
            torch.autocast(inputs[0].device.type, enabled=False),
        ):  # what was cast is cast in the graph
            return graph(inputs)

    @torch.no_grad()
    def _try(self, entry: _Traced, whole: _Graph, inputs: list[Tensor], state: list[Tensor]) -> bool:
        """Returns whether the graph agreed with the model itself on other data and weights.

        Whatever was taken past the trace would be what it was when it was traced. If all examples are dropped, nothing
        can be said.

        Raises:
            UnsupportedModelError: if it did not agree.
        """
        absent, *tensors = inputs
        others = [absent.roll(1), *(_other(t) for t in tensors)]
        trained = [p for p in state if p.requires_grad]
        before = [p.clone() for p in trained]
        try:
            torch._foreach_mul_(trained, 1.25)
            with undisturbed(self._module) as restore:
                expected = whole([*others, *state])
                restore()
                found = self._as_run(entry.graph, [*others, *state])
        finally:
            torch._foreach_copy_(trained, before)
        coarse = _is_coarse(entry.graph, [*tensors, *state])
        names = ("the losses", "how many are dropped", "the norms", *entry.names)  # clipping hides a factor in the sums
        wrong = _differing(names, found, expected, tolerance=5e-2 if coarse else 2e-3)
        if wrong:
            raise UnsupportedModelError(
                "compile=True: the graph of the step does not follow the model to other data and weights, in "
                f"{', '.join(wrong)}. Something passed by autograd and the trace: `.data`, NumPy, a value "
                "made a Python number. Use detach() and torch operations there, or train with compile=False."
            )
        return bool(expected[2].isfinite().all(0).logical_and(~others[0]).any())


def _is_coarse(graph: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Returns whether something is computed in half precision."""
    told = (a for node in graph.graph.nodes for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype))
    return not _HALF.isdisjoint({*told, *(t.dtype for t in inputs)})


def _other(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    return t.roll(1, 0) * 0.875 if t.is_floating_point() else t.roll(1, 0)


def _differing(
    names: Sequence[str], found: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float
) -> list[str]:
    wrong = []
    least = 1e-5 * max((float(e.norm()) for e in expected[3:]), default=0.0)
    for place, (name, f, e) in enumerate(zip(names, found, expected, strict=True)):
        sure = e.isfinite()
        difference, size = (float((t * sure).nan_to_num(0.0, 0.0, 0.0).double().norm()) for t in (f - e, e))
        allowed = tolerance * max(size, least if place > 2 else 0.0)
        if not torch.equal(f.isfinite(), sure) or not difference <= allowed:
            wrong.append(name)
    return wrong
