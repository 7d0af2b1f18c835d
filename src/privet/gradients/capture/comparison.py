"""Captured gradients compared with autograd's own, of examples whose neighbors are others.

The batch is split into two halves at random. Each example's output gradient is multiplied by a random number of its
own. For each half, two sums of gradients have to be equal:

* the sum of what capture recorded for these examples, in the batch as it is;
* what autograd finds for these examples, in a batch in which all others are replaced.

Every mistake of one of four kinds makes them differ: a use that was missed or counted twice, rows that were given to
the wrong example, a forward that mixes examples, and a backward that does.

A difference may also be rounding: a sum whose terms cancel is nothing else. So nobody is refused for a difference
before it was looked at again in double precision, and compared with the difference between equal runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.kept import opened
from privet.batches.replace import nearest, rearranged
from privet.errors import CoverageError, UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.drawn import NothingDropped, packs
from privet.gradients.capture.other_values import in_double, to_double
from privet.gradients.capture.output_gradients import differentiable, fitted, weighted, within
from privet.gradients.capture.terms import HALF, is_coarse, terms_of
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.spread import HERE, Spread
from privet.gradients.summation import weighted_sums
from privet.gradients.use import Recorded

__all__ = ["Comparison"]

_REPEATS = 6
"""How often equal runs are repeated to see how much they differ."""


@dataclass(frozen=True)
class _Tolerance:
    """What may differ: parts of a gradient's own size, of its terms before they cancel, and of the largest gradient."""

    size: float
    terms: float
    largest: float


_SINGLE = _Tolerance(size=2e-3, terms=1e-5, largest=2e-8)
_DOUBLE = _Tolerance(size=1e-4, terms=1e-6, largest=1e-10)
_COARSE = _Tolerance(size=5e-2, terms=0.0, largest=5e-7)
_UNSURE = {_SINGLE: _Tolerance(2e-3, 1e-4, 5e-5), _COARSE: _Tolerance(5e-2, 1e-2, 1e-3)}
"""What may differ where the model cannot run in double precision, so that rounding cannot be told apart."""


@dataclass(frozen=True)
class _Look:
    """What two sides found, for each half: sums of gradients by parameter; none is a sum of zero."""

    expected: Sequence[Mapping[str, Tensor]]
    captured: Sequence[Mapping[str, Tensor]]
    sizes: Mapping[str, float]  # the root of the sum of the examples' squared norms
    terms: Mapping[str, float]  # the same of all terms of each example's gradient
    coarse: bool  # whether something was computed in half precision


@dataclass(frozen=True)
class _Verdict:
    """Which parameters' gradients differ, whether all could be compared, and how it was judged."""

    wrong: Mapping[str, str]
    finite: bool
    tolerance: _Tolerance
    double: bool = False


class Comparison:
    """Compares both gradients of one model.

    Args:
        module: the model, which is put into double precision for a second look.
        capture: knows the layouts, and is not in use.
        run: returns the model's differentiable outputs for some inputs.
        tripwires: are kept quiet while autograd's own gradients are formed.
        restore: is called before each run, to put state and random numbers back.
        batch_axis: the axis of the inputs that the examples are on.
        spread: the processes that hold the model together, which compare alike.
    """

    def __init__(
        self,
        module: nn.Module,
        capture: Capture,
        run: Callable[[Any], Sequence[Tensor]],
        *,
        tripwires: Tripwires,
        restore: Callable[[], None],
        batch_axis: int,
        spread: Spread = HERE,
    ) -> None:
        self._spread = spread
        self._module = module
        self._capture = capture
        self._run = run
        self._tripwires = tripwires
        self._restore = restore
        self._axis = batch_axis
        self._shapes: list[list[torch.Size]] | None = None  # of the outputs beside other examples, if they differ
        self._lengths_stay = False  # whether examples are replaced by others as if these were of their length
        self.held = 0  # the most bytes that a backward has kept of an example
        self._parameters = {name: p for name, p in capture.parameters.items() if p.requires_grad}

    def check(self, inputs: Any, examples: int) -> bool:
        """Returns whether all could be compared: gradients that are not finite cannot.

        Raises:
            CoverageError: if what was captured is not what autograd finds, with the parameters by name; also if it is,
                and an example's gradient depends on the other examples.
        """
        verdict = self._verdict(inputs, examples)
        if verdict.wrong and self._packs(inputs):
            self._lengths_stay, self._shapes = True, None
            beside = self._verdict(inputs, examples)
            self._lengths_stay, self._shapes = False, None
            if not beside.wrong:
                with NothingDropped():
                    verdict = self._verdict(inputs, examples)
        if verdict.wrong:
            raise self._error(verdict, inputs, examples)
        return verdict.finite

    def _verdict(self, inputs: Any, examples: int) -> _Verdict:
        """Returns what differs, in up to three looks."""
        look = self._look(inputs, examples)
        tolerance = _COARSE if look.coarse else _SINGLE
        self._refuse_unlike(look)
        wrong, finite = self._judged(look, tolerance)
        if not wrong:
            return _Verdict(wrong, finite, tolerance)
        second = self._look_in_double(inputs, examples)
        if second is not None:
            look, tolerance = second, _DOUBLE
            wrong, finite = self._judged(look, tolerance)
        else:
            tolerance = _UNSURE[tolerance]
        if wrong:
            wrong, finite = self._judged(look, tolerance, self._noise(inputs, examples, double=second is not None))
        return _Verdict(wrong, finite, tolerance, double=second is not None)

    # -- one look ----------------------------------------------------------------------------------------------------

    def _look(self, inputs: Any, examples: int, *, others_replaced: bool = True) -> _Look:
        """Runs the model once under capture, and once without for each half."""
        generator = torch.Generator().manual_seed(0)  # no secret: which rows are checked against which
        parts = _halves(examples, generator)
        factors = 0.5 + torch.rand(examples, generator=generator, dtype=torch.float64)
        stay, axis = self._lengths_stay, self._axis
        others = [
            rearranged(inputs, nearest((half == 0).tolist()), examples=examples, axis=axis, lengths_stay=stay)
            if others_replaced
            else inputs
            for half in parts
        ]
        recorded, draws = self._captured(inputs, examples, generator, parts)
        weights = [factors * half for half in parts]
        device = next(iter(self._parameters.values())).device
        wide = torch.float64 if any(t.dtype == torch.float64 for t in draws) else torch.float32
        captured, sizes = weighted_sums(recorded, self._parameters, [w.to(device, wide) for w in weights])
        terms, coarse = terms_of(recorded), is_coarse(recorded)
        del recorded  # what it holds, before the next forward needs as much memory
        expected = []
        for other, weight in zip(others, weights, strict=True):
            found = self._own(other, [weighted(d, weight, self._axis) for d in draws])
            if found is None:  # as long as the longest example is, say
                self._shapes = [self._shapes_of(each) for each in others]
                return self._look(inputs, examples, others_replaced=others_replaced)
            expected.append(found)
        return _Look(expected, captured, sizes, terms, coarse)

    def _captured(
        self, inputs: Any, examples: int, generator: torch.Generator, parts: Sequence[Tensor]
    ) -> tuple[Recorded, list[Tensor]]:
        """Runs forward and backward under capture. Returns what was recorded, and the outputs' gradients."""
        recorded = Recorded(examples=examples)
        self._restore()
        self._capture.begin(examples, recorded, inputs=opened(inputs))
        try:
            outputs = differentiable(self._run(inputs))
            self._capture.end(outputs)
            draws = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
            if self._shapes is not None:
                draws = [within(d, parts, shapes, self._axis) for d, *shapes in zip(draws, *self._shapes, strict=True)]
            torch.autograd.backward(outputs, draws)
        finally:
            self._capture.release()
        self.held = max(self.held, -(-recorded.held // examples))
        return recorded, draws

    def _shapes_of(self, inputs: Any) -> list[torch.Size]:
        self._restore()
        with self._tripwires.quiet():
            return [o.shape for o in differentiable(self._run(inputs))]

    def _packs(self, inputs: Any) -> bool:
        self._restore()
        with self._tripwires.quiet():
            return packs(lambda: self._run(inputs))

    def _own(self, inputs: Any, gradients: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Returns autograd's own gradients, or None if outputs are found to be longer or shorter than their gradients.

        An output may be as long as the longest example. Then examples are compared as far as both outputs reach.
        """
        self._restore()
        with self._tripwires.quiet() as arrived:
            outputs = differentiable(self._run(inputs))
            shapes, given = [o.shape for o in outputs], [g.shape for g in gradients]
            if shapes != given:
                kept = [(len(shape), *shape[: self._axis + 1][self._axis :]) for shape in (*shapes, *given)]
                if len(shapes) != len(given) or kept[: len(shapes)] != kept[len(shapes) :]:
                    raise UnsupportedModelError(
                        "the model's outputs have other shapes when some examples of the batch are replaced by copies "
                        f"of others: {list(map(tuple, shapes))} where they had {list(map(tuple, given))}. Expected "
                        "outputs that have a row for each example whatever its values are."
                    )
                if self._shapes is None:
                    return None
                gradients = [fitted(g, shape) for g, shape in zip(gradients, shapes, strict=True)]
            torch.autograd.backward(outputs, list(gradients))
            found = arrived()
        if self._spread.parts is None:
            return found
        own, met = self._spread.parts.own, {name: self._capture.roots.part(name) for name in found}
        return {name: g if (p := met[name]) is None else own(g, p) for name, g in sorted(found.items())}

    def _refuse_unlike(self, look: _Look) -> None:
        """Raises if processes that each have all of a parameter found other gradients of it."""
        if self._spread.parts is None:
            return
        found = {name: _of(look.expected[0], name, p) for name, p in self._parameters.items()}
        unlike = self._spread.parts.unlike(found)
        if unlike:
            raise UnsupportedModelError(
                f"parameters that are whole on every rank of a tensor parallel group have another gradient on some of "
                f"them: {', '.join(unlike)}. They met a part of the data on each rank, and no plan says so. Expected "
                "the same data on all of them, or a plan. Use SequenceParallel for a normalisation of some positions, "
                "and gather what is in parts (PrepareModuleInput, or output_layouts=Replicate()) before other layers."
            )

    # -- doubt -------------------------------------------------------------------------------------------------------

    def _look_in_double(self, inputs: Any, examples: int, *, others_replaced: bool = True) -> _Look | None:
        """Returns a look in double precision, or None if the model cannot run in it."""
        self._restore()
        if self._capture.roots.transient:  # what is gathered from other ranks keeps its type
            return None
        with in_double(self._module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._look(to_double(inputs), examples, others_replaced=others_replaced)
            except Exception:  # noqa: BLE001 - whatever a model says that wants one type of number
                self._capture.release()
                return None

    def _noise(self, inputs: Any, examples: int, *, double: bool) -> dict[str, float]:
        """Returns by how much each parameter's sums differ between equal runs."""
        noise: dict[str, float] = {}
        looks = []
        for _ in range(_REPEATS):
            look = self._look_in_double(inputs, examples) if double else self._look(inputs, examples)
            if look is not None:
                looks.append(look)
        for name, p in self._parameters.items():
            for side in ("expected", "captured"):
                for half in range(len(looks[0].expected) if looks else 0):
                    sums = [_of(getattr(look, side)[half], name, p) for look in looks]
                    spread = max((_norm(s - sums[0]) for s in sums), default=0.0)
                    noise[name] = max(noise.get(name, 0.0), spread)
        return noise

    # -- the verdict -------------------------------------------------------------------------------------------------

    def _judged(
        self, look: _Look, tolerance: _Tolerance, noise: Mapping[str, float] | None = None
    ) -> tuple[dict[str, str], bool]:
        """Returns the parameters whose sums differ, with what was captured, and whether all sums are finite."""
        wrong: dict[str, str] = {}
        finite = True
        largest = max(filter(math.isfinite, look.sizes.values()), default=0.0)
        for name, p in self._parameters.items():
            sums = [
                (_of(own, name, p), _of(got, name, p)) for own, got in zip(look.expected, look.captured, strict=True)
            ]
            norms = [_norm(own) for own, _ in sums]
            if not all(map(math.isfinite, norms)):
                finite = False
                continue
            for (own, got), norm in zip(sums, norms, strict=True):
                size = max(_finite(look.sizes.get(name)), norm)
                allowed = tolerance.size * size + tolerance.terms * _finite(look.terms.get(name))
                allowed += tolerance.largest * largest
                if noise is not None:  # where all is noise, it may be as large as the gradient, and is still small
                    allowed += min(8.0 * noise.get(name, 0.0), max(5e-2 * size, 1e-2 * largest))
                if not _norm(own - got) <= allowed:
                    wrong[name] = "another gradient" if bool(got.any()) else "no gradient"
        # One verdict for all processes: they go on with as many forwards, and raise alike.
        judged = self._spread.together({**wrong, **({} if finite else {"": "not finite"})})
        return {name: kind for name, kind in judged.items() if name}, "" not in judged

    def _error(self, verdict: _Verdict, inputs: Any, examples: int) -> CoverageError:
        """Returns the error for sums that differ: they may do so with the others in their place, or only without."""
        wrong = verdict.wrong
        same = self._look_in_double if verdict.double else self._look
        look = same(inputs, examples, others_replaced=False)
        still = self._judged(look, verdict.tolerance)[0] if look is not None else wrong
        if not still:
            return CoverageError(
                "examples are mixed inside the model: with other examples beside them, some examples have another "
                f"gradient of {', '.join(wrong)}. Expected each example's gradient to depend on that example alone. "
                "Look for statistics over the batch, in the forward, in the backward of a custom autograd Function, "
                "and in hooks on tensors. Take them over each example."
            )
        # No norms, which tell of private data.
        return CoverageError(
            "on the batch that was checked, the per-example gradients of half of the examples do not add up to the "
            "gradient of their outputs:\n  "
            + "\n  ".join(f"{name}: {kind} was captured" for name, kind in still.items())
            + "\nEither examples are mixed (a mean over the batch, a load-balancing loss of a mixture of experts, a "
            "batch axis that is not where it seems), or a parameter is used in a way that was not captured (a custom "
            "autograd Function). Keep examples apart, or register a rule for the operation (privet.register_rule)."
        )


# -- pieces ------------------------------------------------------------------------------------------------------------


def _halves(examples: int, generator: torch.Generator) -> list[Tensor]:  # (B,) of zeros and ones
    """Returns which examples are in the one half, drawn at random, and which are in the other."""
    half = torch.zeros(examples, dtype=torch.float64)
    half[torch.randperm(examples, generator=generator)[: (examples + 1) // 2]] = 1.0
    return [half, 1.0 - half] if examples > 1 else [half]


def _of(sums: Mapping[str, Tensor], name: str, p: nn.Parameter) -> Tensor:
    found = sums.get(name)
    if found is None:
        return torch.zeros(p.shape, device=p.device, dtype=p.dtype)
    dense = found.detach() if found.layout == torch.strided else found.detach().to_dense()
    dense = dense.reshape(p.shape)
    return dense.float() if dense.dtype in HALF else dense


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.complex128 if t.is_complex() else torch.float64))


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
