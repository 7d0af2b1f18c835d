"""Is one architecture exact at both doors, and does one example move its sum by at most the clip norm?

Each door trains four private copies of the model:

    C = a tenth of the least norm      one batch of 5
    C = the median norm                5, the same without the last example, with the last one changed, and 16 examples
    C = 1e6                            16 examples, as many as positions and as the width; then 4, as many as heads
    C = the median norm, dropout on    the same seed as plain autograd had; then without the last example's loss

Without dropout the sums are compared with those of one example at a time, in float64.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import TINY, Batch, Case
from benchmarks.zoo.doors import DOORS, Asked, moved_by, sums
from benchmarks.zoo.plain import Gradients, alone, clipped, norms, seeded, together
from benchmarks.zoo.still import still
from privet.errors import PrivetError

__all__ = ["Finding", "examine"]

Finding = dict[str, Any]
TOLERANCE = 1e-5
"""Relative to the terms of each parameter's sum: models that compute in float32 inside are as far off as 1e-7."""
IN_SINGLE = 2e-3
"""The same, for the few models that cannot run in float64."""
SEED = 0


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _typed(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)


def _real(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns the model in this format. Complex parameters stay as they are."""
    return model.double() if dtype == torch.float64 else model.float()


def _changed(batch: Batch) -> Batch:
    """Returns the batch with another last example: numbers a thousand times as large, tokens in another order."""
    changed = []
    for t in batch:
        last = t[-1:] * 1000 if t.is_floating_point() else t[-1:].flip(-1) if t.dim() > 1 else t[-1:]
        changed.append(torch.cat([t[:-1], last]))
    return tuple(changed)


class _Examined:
    """One case at one door: what was compared, and the worst that was found."""

    def __init__(self, case: Case, door: str, tolerance: float) -> None:
        self.case, self.door, self.tolerance = case, door, tolerance
        self.compared = 0
        self.found: Finding = {"error": 0.0, "moved": 0.0, "where": ""}

    def compare(self, what: str, found: Any, gradients: Gradients, bound: float) -> None:
        self.compared += 1
        error, name = clipped(gradients, bound).error(found)
        if error > self.found["error"]:
            self.found |= {"error": error, "where": f"{name}, {what}"}

    def bound(self, what: str, a: Any, b: Any, bound: float) -> None:
        moved = moved_by(a, b) / bound
        if not moved <= self.found["moved"]:  # NaN too
            self.found |= {"moved": moved, "moved_where": what}

    @property
    def verdict(self) -> str:
        assert self.compared, "nothing was compared"
        right = self.found["error"] <= self.tolerance and self.found["moved"] <= 1 + self.tolerance
        return "exact" if right else "WRONG"


def _without_dropout(case: Case, model: nn.Module, draw: Any, seen: _Examined, *, short: bool) -> None:
    five, four, many = draw(5), draw(TINY.heads), draw(TINY.positions)
    fewer, other = tuple(t[:-1] for t in five), _changed(five)
    rows, of_others, of_many = (alone(case, model, b) for b in (five, other, many))
    sizes = [n for n in norms(rows) if n > 0] or [1.0]
    tenth, middle = min(sizes) / 10, median(sizes)
    door = seen.door
    steps = [Asked(b) for b in (five, fewer, other, many)]
    whole, less, changed, sixteen = sums(door, case, model, steps, middle)
    seen.compare("C = median norm", whole, rows, middle)
    seen.compare("without the last example", less, rows[:-1], middle)
    seen.compare("16 examples after 5", sixteen, of_many, middle)
    if all(torch.isfinite(g).all() for g in of_others[-1].values()):
        seen.compare("last example changed", changed, of_others, middle)
    seen.bound("last example removed", whole, less, middle)
    seen.bound("last example changed", changed, less, middle)
    if short:
        return
    (small,) = sums(door, case, model, [Asked(five)], tenth)
    seen.compare("C = least norm / 10", small, rows, tenth)
    sixteen, heads = sums(door, case, model, [Asked(many), Asked(four)], 1e6)
    seen.compare("16 examples first", sixteen, of_many, 1e6)
    seen.compare("4 examples after 16", heads, alone(case, model, four), 1e6)


def _with_dropout(case: Case, model: nn.Module, draw: Any, seen: _Examined) -> None:
    """Draws as plain autograd draws, then leaves out the last example's loss: the draws of the others stay the same."""
    batch = draw(5)
    weights = torch.ones(5, dtype=next(model.parameters()).dtype)
    weights[-1] = 0.0
    drawn = [together(case, model, batch, SEED + 1, anew=anew) for anew in (False, True)]
    middle = median(norms(drawn[0])) or 1.0
    steps = [Asked(batch), Asked(batch), Asked(batch, seed=SEED + 1), Asked(batch, weights, seed=SEED + 1)]
    *_, whole, less = sums(seen.door, case, model, steps, middle)
    rows = min(drawn, key=lambda each: clipped(each, middle).error(whole))
    seen.compare("dropout on", whole, rows, middle)
    seen.bound("dropout on, last example's loss left out", whole, less, middle)


def _once(case: Case, model: nn.Module, draw: Any, door: str) -> None:
    """Takes one step, for a model that is to be refused: batch normalization has no sum of one example at a time."""
    sums(door, case, model, [Asked(draw(5))], 1.0)


def _stage(name: str, seen: _Examined, run: Any) -> bool:
    """Runs one part of what is examined. Returns whether it ran to its end."""
    try:
        with _quiet():
            run()
    except PrivetError as error:
        seen.found |= {"verdict": "refused", "stage": name, "error_type": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - a case that fails is a result
        seen.found |= {"verdict": "failed", "stage": name, "error_type": type(error).__name__, "message": str(error)}
    else:
        return True
    seen.found["message"] = seen.found["message"][:1500]
    return False


def examine(case: Case, *, short: bool = False) -> Finding:
    """Returns what was found of a case, as plain values. A short one has one clip norm, and dropout at one door."""
    began = time.perf_counter()
    finding: Finding = {"name": case.name, "family": case.family, "short": short or case.short}
    dtype = torch.float64 if case.double else torch.float32
    try:
        with _quiet():
            seeded(SEED)
            random = _real(case.build(TINY), dtype).train()
            seeded(SEED)
            model = still(_real(case.build(TINY), dtype).train())
            seeded(SEED + 2)
            probe = _typed(case.batch(2, TINY), dtype)
            with torch.no_grad():  # old parametrizations keep what a forward made, which cannot be copied
                first, second = case.loss(model, probe), case.loss(model, probe)
                other = [case.loss(random, probe) for _ in range(2)]
            assert first.shape == (2,), f"a loss of shape {tuple(first.shape)}"
            finding["repeats"] = torch.allclose(first, second, rtol=1e-9)
            finding["dropout"] = not torch.equal(*other)
            finding["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    except Exception as error:  # noqa: BLE001 - a case that fails is a result
        message = f"{type(error).__name__}: {error}"
        return finding | {"verdict": "not built", "message": message[:1500]}

    def draw(n: int) -> Batch:
        seeded(SEED + 3 + n)
        return _typed(case.batch(n, TINY), dtype)

    for door in DOORS if case.paper and not case.way else DOORS[1:]:
        seen = _Examined(case, door, TOLERANCE if case.double else IN_SINGLE)
        if case.refused and not _stage("dropout off", seen, lambda d=door: _once(case, model, draw, d)):
            finding[door] = seen.found
            continue
        # A model that draws numbers of its own (a variational autoencoder) has no forward without.
        whole = not finding["repeats"] or _stage(
            "dropout off", seen, lambda s=seen: _without_dropout(case, model, draw, s, short=short or case.short)
        )
        skipped = case.short or (short and door == "paper" and finding["repeats"])
        if whole and finding["dropout"] and not skipped:
            seen.found["with_dropout"] = _stage("dropout on", seen, lambda s=seen: _with_dropout(case, random, draw, s))
        if "verdict" not in seen.found:
            seen.found["verdict"] = seen.verdict
        finding[door] = seen.found
    return finding | {"seconds": round(time.perf_counter() - began, 1)}
