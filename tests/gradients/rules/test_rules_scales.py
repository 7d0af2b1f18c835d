"""Factors of any size, on every rule: the clipped sum of one example stays within the clip norm, or it is dropped.

The factors are what a rule gets, the data that a parameter met and the gradient that came back. They are scaled here
after a real forward and backward, because no forward would go through with most of these sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from privet.clipping import Flat
from privet.gradients import gathered
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.rules import bag, convolution, embedding, linear
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Allowance, Recorded, Use
from tests.gradients import rule_cases_more
from tests.gradients.harness import recorded_of, trainable
from tests.gradients.rule_cases import CASES, Case, Inputs, Twice, ids, loss, reals

SLACK = 1e-3
BOUNDS = (1e-30, 1e-4, 1.0, 1e4, 1e30)
FINE = (*range(-45, 39, 4), -22.6, 18.9)
# Powers of ten of data and gradient. A square vanishes below -22.6 or so, and a norm above 19.2 is infinite.
EDGES = [(-22.6, 19.0), (-22.6, 18.5), (-23.5, 18.9), (-30, 18.9), (-38, 30), (-20, 20), (-20, 18)]
PAIRS = [*EDGES, *((g, a) for a, g in EDGES), (0, 0), (-38, -38), (12, -11), (18, 18), (38, 38), (30, -38)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


def rescaled(recorded: Recorded, data: Tensor, gradient: Tensor) -> Recorded:  # (B,) float64 each
    """Returns the uses with every row of their data and gradients scaled, both in the type that they have."""

    def times(t: Tensor | None, factors: Tensor) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        factors = factors.repeat_interleave(len(t) // len(factors))
        return (t.double() * factors.view(-1, *[1] * (t.dim() - 1))).to(t.dtype)

    def one(use: Use) -> Use:
        back = times(use.gradient, gradient)
        assert back is not None
        return replace(use, data=tuple(times(d, data) for d in use.data), gradient=back)

    return Recorded(
        recorded.examples,
        {name: [one(use) for use in uses] for name, uses in recorded.direct.items()},
        {derivation: [one(use) for use in uses] for derivation, uses in recorded.derived.items()},
    )


def powers(*exponents: float) -> Tensor:
    return torch.tensor([10.0**e for e in exponents], dtype=torch.float64)


@pytest.fixture(params=["rows kept", "no row kept"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets rules keep rows for their sums, or forces each to form its sums from factors."""
    if request.param != "rows kept":
        monkeypatch.setattr(gathered, "Allowance", lambda: Allowance(0))


def size(clipped: ClippedSum) -> float:
    """Returns the norm of the sum in float64, scaled first: squares of 1e30 and of 1e-38 are within its range."""
    return math.sqrt(sum(float(v.double().square().sum()) for v in clipped.values.values()))


def check(module: nn.Module, recorded: Recorded, bound: float, what: object) -> None:
    """Looks at every parameter by itself: a bias in the same clipping group would hide what is wrong with a weight."""
    for name, parameter in trainable(module).items():
        moved = size(clipped_sum(recorded, {name: parameter}, Flat(bound)))
        assert moved <= bound * (1.0 + SLACK), (name, what, bound, moved / bound)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def more() -> list[Case]:
    """Returns forms of what is nearest to the edge: products of two factors, of one entry each, and of many."""
    one, many = reals((1,)), reals((784,))
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("one feature", lambda: nn.Linear(1, 1), one),
        ("many features", lambda: nn.Linear(784, 1), many),
        ("a product", Product, reals((6,))),
        ("few positions", lambda: nn.Linear(96, 64), reals((3, 96))),
        ("many positions", lambda: nn.Linear(3, 4), reals((40, 3))),
        ("used twice", lambda: Twice(nn.Linear(5, 5)), reals((5,))),
        ("tied", Tied, ids(7, 4)),
    ]
    return [Case("linear", *row) for row in rows]


class Tied(nn.Module):
    """A table that is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))

    def forward(self, places: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(places, self.table)), self.table)


ALL = [*CASES, *more()]


def of(case: Case, size: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Recorded]:
    torch.manual_seed(3)
    module = case.module().to(dtype)
    return module, recorded_of(module, case.inputs(size, dtype), loss)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_one_example_of_any_scale_stays_within_the_clip_norm(case: Case) -> None:
    module, recorded = of(case, 1)
    for k, (data, gradient) in enumerate(PAIRS):
        scaled = rescaled(recorded, powers(data), powers(gradient))
        check(module, scaled, 1e-4 if (data, gradient) in EDGES else BOUNDS[k % 5], (data, gradient))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_same_on_a_fine_grid_and_in_other_types(case: Case, dtype: torch.dtype) -> None:
    module, recorded = of(case, 1, torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        recorded = halved(recorded, dtype)
    for data, gradient in itertools.product(FINE, FINE):
        scaled = rescaled(recorded, powers(data), powers(gradient))
        for bound in BOUNDS:
            check(module, scaled, bound, (data, gradient))


def halved(recorded: Recorded, dtype: torch.dtype) -> Recorded:
    """Returns the uses as autocast would have left them: factors in half precision."""

    def one(use: Use) -> Use:
        data = tuple(d.to(dtype) if d is not None and d.is_floating_point() else d for d in use.data)
        return replace(use, data=data, gradient=use.gradient.to(dtype))

    direct = {name: [one(use) for use in uses] for name, uses in recorded.direct.items()}
    return Recorded(recorded.examples, direct, {d: [one(use) for use in uses] for d, uses in recorded.derived.items()})


@given(
    case=st.sampled_from(ALL),
    rows=st.lists(st.tuples(st.floats(-45, 38.4), st.floats(-45, 38.4)), min_size=3, max_size=3),
    bound=st.sampled_from(BOUNDS),
)
def test_no_row_disturbs_another(case: Case, rows: list[tuple[float, float]], bound: float) -> None:
    """Rows of any scale in one batch: none brings a NaN into the sum, and together they move it by their clip norms."""
    module, recorded = of(case, 3)
    data, gradients = zip(*rows, strict=True)
    scaled = rescaled(recorded, powers(*data), powers(*gradients))
    for name, parameter in trainable(module).items():
        moved = size(clipped_sum(scaled, {name: parameter}, Flat(bound)))
        assert moved <= 3 * bound * (1.0 + SLACK), (name, moved / bound)


@pytest.mark.parametrize("case", more(), ids=str)
def test_gradients_of_a_mean_are_scaled_back_before_any_is_lost(case: Case) -> None:
    module, recorded = of(case, 1)
    examples = 4096.0
    for data, gradient in EDGES:
        scaled = rescaled(recorded, powers(data), powers(gradient) / examples)
        for name, parameter in trainable(module).items():
            moved = size(clipped_sum(scaled, {name: parameter}, Flat(1e-3), scale=examples))
            assert moved <= 1e-3 * (1.0 + SLACK), (name, data, gradient)


def cancelling() -> list[Case]:
    rows: list[tuple[str, Callable[[], nn.Module], Inputs]] = [
        ("linear", lambda: nn.Linear(64, 48, bias=False), reals((80, 64))),
        ("few features", lambda: nn.Linear(6, 5, bias=False), reals((80, 6))),
        ("convolution", lambda: nn.Conv2d(3, 4, (1, 2), bias=False), reals((3, 80, 2))),
        ("bilinear", lambda: nn.Bilinear(3, 4, 5, bias=False), reals((80, 3), (80, 4))),
        ("bag", lambda: rule_cases_more.Bag("sum"), repeated),
        ("embedding", lambda: nn.Embedding(7, 5), lambda n, dtype: repeated(n, dtype)[:1]),
        ("embedding of few repeated ids", lambda: nn.Embedding(200, 70), rarely),
    ]
    return [Case("cancelling", *row) for row in rows]


def repeated(examples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns ids of which all are equal, and weights."""
    return torch.full((examples, 80), 3), torch.randn(examples, 80, dtype=dtype)


def rarely(examples: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Returns ids of which few are equal."""
    places = torch.arange(80).expand(examples, 80).clone()
    places[:, 70:] = places[:, 60:70]
    return (places,)


def folded(t: Tensor, positions: int, *, sign: int, size: int) -> Tensor:
    """Returns `t` with the second half of its positions equal to the first, times the sign, in a mixed order."""
    axis = next(k for k, n in enumerate(t.shape) if n == positions and k)
    half = t.narrow(axis, 0, positions // 2) * size
    order = torch.randperm(positions, generator=torch.Generator().manual_seed(1))
    return torch.cat([half, half * sign], dim=axis).index_select(axis, order)


def largest_rest(case: Case) -> float:
    """Returns the most by which an example moves the sum whose terms all cancel, over some seeds."""
    most = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        module = case.module()
        (parameter,) = trainable(module).values()
        recorded = recorded_of(module, case.inputs(1, torch.float32), loss)
        ((name, (use,)),) = recorded.direct.items()
        first, *others = use.data
        assert first is not None
        if first.is_floating_point() or not others:
            data = tuple(folded(d, 80, sign=1, size=1) for d in use.data if d is not None)
            gradient = folded(use.gradient, 80, sign=-1, size=10**9)
        else:
            (weights,) = others
            assert weights is not None
            data, gradient = (first, folded(weights, 80, sign=-1, size=10**9)), use.gradient
        uses = {name: [replace(use, data=data, gradient=gradient)]}
        most = max(most, size(clipped_sum(Recorded(1, uses), {name: parameter}, Flat(1.0))))
    return most


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("case", cancelling(), ids=str)
def test_terms_that_cancel_leave_no_more_than_the_clip_norm(case: Case) -> None:
    """All terms of the gradient cancel: norm and sum are of nothing but rounding errors, not of the same ones."""
    assert largest_rest(case) <= 1.0 + SLACK


def test_the_test_above_would_see_norms_that_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (bag, convolution, embedding, linear):
        monkeypatch.setattr(family, "padded", lambda squared, *sizes: squared)
    monkeypatch.setattr(gathered, "Allowance", lambda: Allowance(0))
    assert max(map(largest_rest, cancelling())) > 1.0 + SLACK
