"""Every row of the table against plain autograd, one example at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privet.clipping import Flat, PerLayer
from privet.gradients.reference import example_gradients
from privet.gradients.summation import clipped_sum
from tests.contracts.doors import expected_sum, relative_error
from tests.gradients.harness import captured_sum, recorded_of, trainable
from tests.gradients.rule_cases import CASES, Case, loss

POLICIES = {"all clipped": Flat(1e-2), "none clipped": Flat(1e6), "by layer": PerLayer(1.0)}
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}

pytestmark = [  # torch's own, of the plain module
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_clipped_sum_is_the_reference(case: Case, dtype):
    module = case.module().to(dtype)
    for size in (1, 2, 17):
        batch = case.inputs(size, dtype)
        examples = [tuple(t[i : i + 1] for t in batch) for i in range(size)]
        gradients = example_gradients(module, examples, lambda m, b: loss(m, b).sum())
        recorded = recorded_of(module, batch, loss)
        for name, policy in POLICIES.items():
            found = clipped_sum(recorded, trainable(module), policy).values
            error = relative_error(found, expected_sum(gradients, policy))
            assert error < LIMITS[dtype], f"{size} examples, {name}: {error}"


@pytest.mark.parametrize("case", [case for case in CASES if case.empty], ids=str)
def test_no_examples_sum_to_zero(case: Case):
    module = case.module()
    total = captured_sum(module, case.inputs(0, torch.float32), loss, Flat(1.0))
    assert set(total) == set(trainable(module))
    assert all(value.shape == dict(module.named_parameters())[name].shape for name, value in total.items())
    assert all(not value.any() for value in total.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_input_gradients_are_those_of_the_plain_module(case: Case):
    module, batch = case.module().double(), case.inputs(3, torch.float64)
    batch = tuple(t.requires_grad_() if t.is_floating_point() else t for t in batch)
    inputs = [t for t in batch if t.requires_grad]
    losses = loss(module, batch)
    plain = torch.autograd.grad(losses.sum(), inputs) if inputs else ()
    seen = []

    def watched(m, b):
        seen.append(loss(m, b))
        return seen[-1]

    recorded_of(module, batch, watched)
    assert torch.allclose(seen[-1], losses, rtol=1e-12, atol=1e-12)
    for t, expected in zip(inputs, plain, strict=True):
        assert torch.allclose(t.grad, expected, rtol=1e-10, atol=1e-12)


class _Attended(nn.Module):
    def __init__(self, **call) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.call = call

    def forward(self, x):
        return self.attention(x, x, x, **self.call)[0]


DROPPING = {
    "attention": _Attended,
    "attention, light": lambda: _Attended(need_weights=False),
    "LSTM": lambda: nn.LSTM(8, 4, 3, dropout=0.5, batch_first=True),
    "GRU, both directions": lambda: nn.GRU(8, 4, 3, dropout=0.5, batch_first=True, bidirectional=True),
}


@pytest.mark.parametrize("name", DROPPING)
def test_the_same_entries_are_dropped_as_by_the_plain_module(name):
    module, x, seen = DROPPING[name]().double(), torch.randn(5, 4, 8, dtype=torch.float64), []

    def seeded(m, b):
        torch.manual_seed(11)
        output = m(*b)
        seen.append(output[0] if isinstance(output, tuple) else output)
        return seen[-1].flatten(1).square().sum(1)

    recorded_of(module, (x,), seeded)
    seeded(module, (x,))
    assert torch.allclose(seen[-1], seen[-2], rtol=1e-12, atol=1e-12)


HALF = (
    "stride and padding",
    "depthwise",
    "conv_transpose2d, groups",
    "many entries",
    "layer norm over",
    "group norm of",
)


@pytest.mark.parametrize("row", HALF)
def test_half_precision_accumulates_in_float32(row):
    case = next(case for case in CASES if row in str(case))
    module, batch = case.module().bfloat16(), case.inputs(4, torch.bfloat16)
    examples = [tuple(t[i : i + 1] for t in batch) for i in range(4)]
    gradients = example_gradients(module, examples, lambda m, b: loss(m, b).sum())
    found = clipped_sum(recorded_of(module, batch, loss), trainable(module), Flat(0.1)).values
    assert all(value.dtype == torch.float32 for value in found.values())
    assert relative_error(found, expected_sum(gradients, Flat(0.1))) < 2e-2


@pytest.mark.parametrize("row", ["stride and padding", "conv1d", "layer norm over", "self, light, causal"])
def test_autocast_is_covered(row):
    case = next(case for case in CASES if row in str(case))
    module, batch = case.module(), case.inputs(3, torch.float32)

    def mixed(m, b):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(m, b).float()

    examples = [tuple(t[i : i + 1] for t in batch) for i in range(3)]
    gradients = example_gradients(module, examples, lambda m, b: mixed(m, b).sum())
    found = clipped_sum(recorded_of(module, batch, mixed), trainable(module), Flat(0.1)).values
    assert relative_error(found, expected_sum(gradients, Flat(0.1))) < 5e-2
