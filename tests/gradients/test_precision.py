"""Products in reduced precision: what torch's settings say, and that no example passes the clip norm by it.

Not every machine has units for such products. So the tests round the operands of every product themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from privet.clipping import Flat
from privet.gradients import gathered
from privet.gradients.precision import eps_in_force, product_error
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Allowance
from tests.gradients.harness import recorded_of, trainable
from tests.gradients.rule_cases import CASES, Case, loss, reals

CPU = torch.device("cpu")
aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.mv, aten.addmv, aten.convolution_backward}
LINEAR = [
    Case("linear", "vectors", lambda: nn.Linear(40, 30, bias=False), reals((40,))),
    Case("linear", "sequences", lambda: nn.Linear(48, 32, bias=False), reals((5, 48))),
    Case("linear", "long sequences", lambda: nn.Linear(5, 4, bias=False), reals((60, 5))),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


def to_bfloat16(t: Tensor) -> Tensor:
    """Returns the nearest numbers of bfloat16, as float32."""
    return t.bfloat16().float()


def up_to_tf32(t: Tensor) -> Tensor:
    """Returns the numbers of TF32 that are farther from zero: the worst of what is one unit away."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1FFF) & ~0x1FFF).view(torch.float32)


PRECISIONS: dict[str, Callable[[Tensor], Tensor]] = {"high": up_to_tf32, "medium": to_bfloat16}


class Rounded(TorchDispatchMode):
    """Rounds every float32 operand of a product, as units for such products do."""

    def __init__(self, taken: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._taken = taken

    def _operand(self, t: Any) -> Any:
        return self._taken(t) if isinstance(t, Tensor) and t.dtype == torch.float32 else t

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            first = 1 if func.overloadpacket in {aten.addmm, aten.addmm_, aten.addmv} else 0
            args = (*args[:first], *map(self._operand, args[first:]))
        return func(*args, **(kwargs or {}))


@contextmanager
def set_to(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def worst(case: Case, taken: Callable[[Tensor], Tensor], *, seeds: int = 1) -> tuple[float, float]:
    """Returns how far one example of some moves the sum of one parameter at least and at most, in clip norms."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = case.module()
        recorded = recorded_of(module, case.inputs(1, torch.float32), lambda m, b: 1e3 * loss(m, b))
        for name, parameter in trainable(module).items():
            with Rounded(taken):
                sums = clipped_sum(recorded, {name: parameter}, Flat(1e-3)).values
            found.append(1e3 * math.sqrt(sum(float(v.double().square().sum()) for v in sums.values())))
    return min(found), max(found)


@pytest.mark.parametrize("keeps", [True, False], ids=["rows kept", "no row kept"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [*LINEAR, *CASES], ids=str)
def test_one_example_stays_within_the_clip_norm(
    case: Case, precision: str, *, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keeps:
        monkeypatch.setattr(gathered, "Allowance", lambda: Allowance(0))
    with set_to(precision):
        least, most = worst(case, PRECISIONS[precision], seeds=6 if case in LINEAR else 1)
    assert most <= 1.0 + 1e-3
    if case.family in {"linear", "convolution"}:  # others have parameters without a gradient
        assert least >= 0.5, "much more is taken from the weights than the rounding asks for"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bound_is_passed_where_no_setting_tells_of_the_rounding(precision: str) -> None:
    most = max(worst(case, PRECISIONS[precision], seeds=6)[1] for case in LINEAR)
    assert most > 1.0 + 1e-3, "products were not rounded: the test above shows nothing"


@pytest.mark.parametrize(("precision", "eps"), [("highest", 0.0), ("high", 2.0**-10), ("medium", 2.0**-8)])
def test_the_setting_in_force_is_read(precision: str, eps: float) -> None:
    with set_to(precision):
        assert eps_in_force(torch.float32, CPU) == eps
        assert eps_in_force(torch.float32, CPU, kind="convolution") == eps
        assert eps_in_force(torch.float64, CPU) == 0.0
        assert product_error(100, torch.float32, CPU) >= 2.0 * eps
    assert eps_in_force(torch.float32, CPU) == 0.0


def test_the_settings_of_gpus_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the settings are there all the same. Convolutions run in TF32 by default."""
    gpu = torch.device("cuda")
    assert eps_in_force(torch.float32, gpu) == 0.0
    assert eps_in_force(torch.float32, gpu, kind="convolution") == 2.0**-10
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert eps_in_force(torch.float32, gpu, kind="convolution") == 0.0
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert eps_in_force(torch.float32, gpu) == 2.0**-10
        assert eps_in_force(torch.float32, CPU) == 0.0
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
