"""The clipped sum in the least memory: one forward, a backward for the norms, and a backward for the weighted sums.

No backward keeps what it saw. In the first, a parameter's uses turn into (B,) norms as soon as all of them are there;
in the second, which knows the weights, every use turns into its part of the sum at once. Both go through the very same
forward, so that dropout masks, buffers and the side of zero on which every activation fell are the same by
construction: the gradients that are summed are those whose norms were taken. Activation checkpointing recomputes in
each of the two backwards what it would recompute in one, with the random numbers of the forward.

Axes: B units of privacy: examples, or their owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.capture.anew import agree_on_doubt
from privet.gradients.capture.capture import Capture
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.derived import Derivation
from privet.gradients.passes.role import Losses
from privet.gradients.spread import HERE, Spread
from privet.gradients.summation import SumSink, masked_sums, squared_norms, statistics_of, total_norms
from privet.gradients.use import Owner, Recorded, Use
from privet.gradients.weights import Policy, groups_of, magnification_of, sensitivity_of, weights_of

__all__ = ["TwoPass", "refuse_several_weights"]

_ATTEMPTS = 3


def refuse_several_weights(policy: Policy, names: list[str]) -> None:
    """Raises unless the policy gives every example one weight for all parameters."""
    groups = len(set(groups_of(policy, names)))
    if groups > 1:
        raise ConfigurationError(
            f"passes=2 weighs each example once, and {type(policy).__name__} has {groups} groups of parameters with a "
            "weight each. Expected a policy of one group, such as Flat. Use passes=1 for this policy."
        )


class TwoPass:
    """Takes one forward at a time through its two backwards.

    Args:
        capture: watches the forward; it is released at the end, whatever happens.
        spread: the processes that hold the model together. Where a backward needs all of them, it runs again on all if
            it has to on one.

    How many uses a parameter has is known only when a backward is over. It is expected to be as in the steps before;
    where more come, the backward for the norms runs again, now knowing. Nothing is released before the norms are.
    """

    def __init__(self, capture: Capture, *, spread: Spread = HERE) -> None:
        self._capture = capture
        self._spread = spread
        self._uses: dict[str, int] = {}  # the most that a backward has brought of each parameter

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
        """Returns the clipped sum and the losses; see `SumOfBatch`. The policy has one group."""
        refuse_several_weights(policy, list(parameters))
        sensitivity = sensitivity_of(policy)
        capture, owner = self._capture, Owner(examples) if owner is None else owner
        try:
            with torch.enable_grad():
                capture.begin(examples, Recorded(examples=examples), last=False, inputs=batch)
                found = losses(batch)
                agree_on_doubt(capture, self._spread)
                capture.end([found])
                total = found.sum()
            standing = capture.standing_for(parameters)  # gathered parameters are known now
            met, names = self._spread.counted(standing), [*reversed(standing)]
            norms = _Norms(met, owner, self._uses)
            capture.turn_to(norms, last=False)
            norms = self._through_norms(total, norms)
            squared = owner.weighted(self._spread.norms.sum(norms.total()), 2)
            weights, left_out = weights_of(policy, squared, absent)
            sink, magnified = self._spread.sink(names), magnification_of(sensitivity)
            weight = owner.weighted(weights[0])
            sums = _Sums(met, owner, weight, left_out, magnified, counts=norms.counts, sink=sink)
            capture.turn_to(sums, last=True)
            total.backward()  # type: ignore[no-untyped-call]
        finally:
            capture.release()
        return ClippedSum(sums.values(), sensitivity, statistics_of(squared, left_out, absent)), found.detach()

    def _through_norms(self, total: Tensor, norms: _Norms) -> _Norms:
        """Goes through backwards for the norms until none brings a late use, and returns the last one's."""
        for _ in range(_ATTEMPTS):
            total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            for name, count in norms.counts.items():
                self._uses[name] = max(count, self._uses.get(name, 1))
            if not self._spread.most(len(norms.late)):
                return norms
            late, norms = norms.late, norms.anew()
            self._capture.turn_to(norms, last=False)
        raise ProtocolError(
            f"two backwards of one forward used {', '.join(sorted(late))} a different number of times. Expected "
            "the same each time: a checkpointed part has to recompute what it computed. Use passes=1."
        )


class _Norms:
    """The sink of the first backward: takes the squared norms of a parameter when as many uses came as are expected."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], owner: Owner, expected: Mapping[str, int]) -> None:
        self.counts: dict[str, int] = {}
        self.late: set[str] = set()  # parameters of which a use came after their norm was taken
        self._parameters = parameters
        self._owner = owner
        self._expected = expected
        self._held: dict[str, Recorded] = {}
        self._norms: dict[str, Tensor] = {}

    def anew(self) -> _Norms:
        """Returns the same before any use has come."""
        return _Norms(self._parameters, self._owner, self._expected)

    @torch.no_grad()
    def put(self, target: str | Derivation, use: Use) -> None:
        """Takes one use of a parameter, or of what was derived from some."""
        for name in _sources(target, self._parameters):
            self.counts[name] = self.counts.get(name, 0) + 1
            if name in self._norms:
                self.late.add(name)
                continue
            self._held.setdefault(name, Recorded()).put(target, use)
            if self.counts[name] >= self._expected.get(name, 1):
                self._reduce(name)

    def _reduce(self, name: str) -> None:
        recorded = self._held.pop(name)
        self._norms[name] = squared_norms(recorded, {name: self._parameters[name]}, self._owner)[name]

    def done(self) -> None:
        """Takes the norms of the parameters of which fewer uses came than were expected."""
        for name in list(self._held):
            self._reduce(name)

    def total(self) -> Tensor:  # (1, B)
        """Returns the squared norms over all parameters."""
        norms = [(norm, self._parameters[name]) for name, norm in self._norms.items()]
        return total_norms([norms], self._owner.units, self._parameters)


class _Sums:
    """The sink of the second backward: turns every use into its part of the weighted sum as it comes.

    The norms have counted the uses of each parameter. So a sum is handed on as soon as it has all of its parts.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owner: Owner,
        weights: Tensor,  # (B,)
        dropped: Tensor | None,  # (B,) bool
        magnified: float,
        *,
        counts: Mapping[str, int],
        sink: SumSink,
    ) -> None:
        self._parameters = parameters
        self._owner = owner
        self._weights = weights * magnified
        self._magnified = magnified
        self._dropped = dropped
        self._left = dict(counts)  # uses that are still to come, by parameter
        self._values: dict[str, Tensor] = {}
        self._sink = sink

    @torch.no_grad()
    def put(self, target: str | Derivation, use: Use) -> None:
        """Takes one use of a parameter, or of what was derived from some."""
        for name in _sources(target, self._parameters):
            if not self._left.get(name):
                raise ProtocolError(
                    f"the second of two backwards of one forward brought more uses of {name} than the first. Expected "
                    "the same in both: a checkpointed part has to recompute what it computed. Use passes=1."
                )
            parameter = self._parameters[name]
            single = Recorded()
            single.put(target, use)
            sums = masked_sums(single, {name: parameter}, self._weights, self._dropped, self._owner)
            value = sums[name].view(parameter.shape)
            self._values[name] = self._values[name] + value if name in self._values else value
            self._left[name] -= 1
            if not self._left[name]:
                self._hand_on(name, self._values.pop(name))

    def _hand_on(self, name: str, value: Tensor) -> None:
        self._sink.put(name, value if self._magnified == 1.0 else value / self._magnified)

    def done(self) -> None:
        """Does nothing: every use was summed as it came."""

    def values(self) -> Mapping[str, Tensor]:
        """Returns the sums, zero for a parameter without a use."""
        for name, p in self._parameters.items():
            if self._left.get(name) != 0:
                dtype = torch.promote_types(p.dtype, torch.float32)
                zero = torch.zeros(p.shape, device=p.device, dtype=dtype)
                self._hand_on(name, self._values.pop(name, zero))
        return self._sink.values()


def _sources(target: str | Derivation, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    names = (target,) if isinstance(target, str) else target.sources
    return [name for name in names if name in parameters]
