"""Each way to a norm gives the same norm, over shapes that hypothesis draws; and what has no rule is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from privet.clipping import Flat
from privet.errors import UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.rules import attention, cells, embedding, normalization, pool, recurrent
from privet.gradients.rules.convolution import Convolution, Geometry
from privet.gradients.rules.convolution_strategy import ConvolutionStrategy, convolution_strategy
from privet.gradients.rules.linear import Linear
from privet.gradients.rules.patches import Pairing
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded, Use, Uses
from tests.contracts.doors import reference, relative_error
from tests.gradients.harness import captured_sum, recorded_of, trainable
from tests.gradients.rule_cases import CASES, loss

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FUNCTIONS = {
    (1, False): torch.conv1d, (2, False): torch.conv2d, (3, False): torch.conv3d,
    (1, True): torch.conv_transpose1d, (2, True): torch.conv_transpose2d, (3, True): torch.conv_transpose3d,
}  # fmt: skip


def by_example(function, *tensors):
    """Returns the gradients of the last tensor for each row of the others, by autograd."""
    *data, parameter = tensors
    rows = []
    for row in zip(*data, strict=True):
        leaf = parameter.clone().requires_grad_()
        output = function(*(t.unsqueeze(0) for t in row[:-1]), leaf)
        rows.append(torch.autograd.grad(output, leaf, row[-1].unsqueeze(0))[0])
    return torch.stack(rows) if rows else parameter.new_zeros(0, *parameter.shape)


@st.composite
def convolutions(draw):
    """Returns an operation, its input and its kernel."""
    dimensions = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.booleans())

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    padding = numbers(0, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(r + 2 * p + draw(st.integers(0, 3)) for r, p in zip(reach, padding, strict=True))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    rows = draw(st.sampled_from([0, 1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (inputs, outputs // groups, *kernel) if transposed else (outputs, inputs // groups, *kernel)
    x = torch.randn(rows, inputs, *size, generator=generator, dtype=dtype)
    if dimensions == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    geometry = Geometry(stride, padding, dilation, groups, extra if transposed else None)
    return Convolution(FUNCTIONS[dimensions, transposed], geometry), x, weight


@quick
@given(convolutions())
def test_every_way_to_the_norms_of_a_convolution_agrees(drawn):
    operation, x, weight = drawn
    y = operation.forward((x,), {"weight": weight})
    gradient = torch.randn_like(y)
    expected = by_example(lambda row, w: operation.forward((row,), {"weight": w}), x, gradient, weight)
    use = Use(operation, "weight", (x,), gradient, tuple(weight.shape))
    rule, limit = operation.rules["weight"], 1e-9 if x.dtype == torch.float64 else 2.5e-4
    norms = expected.double().flatten(1).square().sum(1)
    weights = torch.linspace(0.1, 1.0, len(x), dtype=x.dtype)
    total = torch.einsum("b,b...->...", weights, expected)
    assert torch.allclose(rule.per_example(Uses((use,))), expected, atol=1e-4 if limit > 1e-8 else 1e-10)
    for strategy in ConvolutionStrategy:
        if strategy is ConvolutionStrategy.PIXELS and operation.geometry.groups != 1:
            continue
        if strategy is not ConvolutionStrategy.ROWS and not len(x):
            continue
        uses = Uses((use,))
        found = rule.norms_by(strategy, uses).double()
        assert torch.allclose(found, norms, rtol=limit, atol=limit), strategy
        assert (found >= norms * (1 - 1e-5)).all(), f"{strategy} rounds a norm down"
        assert torch.allclose(rule.weighted_sum(uses, weights), total, rtol=1e-3, atol=1e-4), strategy
    if len(x):
        (found,) = operation.data_gradients((x,), {"weight": weight}, gradient, (True,))
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(operation.forward((leaf,), {"weight": weight}), leaf, gradient)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@quick
@given(
    st.tuples(st.sampled_from([0, 1, 2, 17]), st.integers(0, 12), st.sampled_from([1, 3, 80])), st.integers(1, 40),
    st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_every_way_to_the_norms_of_a_lookup_agrees(shape, entries, padded, seed):
    rows, positions, features = shape
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, entries, (rows, positions), generator=generator)
    gradient = torch.randn(rows, positions, features, generator=generator, dtype=torch.float64)
    table = torch.zeros(entries, features, dtype=torch.float64)
    padding = entries - 1 if padded else None
    expected = by_example(lambda i, w: F.embedding(i, w, padding), places, gradient, table)
    operation = embedding.Lookup(padding=padding)
    rule = operation.rules["table"]
    half = positions // 2
    for uses in (
        Uses((Use(operation, "table", (places,), gradient, tuple(table.shape)),)),
        Uses(
            tuple(
                Use(operation, "table", (places[:, part],), gradient[:, part], tuple(table.shape))
                for part in (slice(0, half), slice(half, None))
            )
        ),
    ):
        assert torch.allclose(rule.per_example(uses), expected)
        assert torch.allclose(rule.squared_norms(uses), expected.flatten(1).square().sum(1))
        weights = torch.linspace(0.1, 1.0, rows, dtype=torch.float64)
        assert torch.allclose(rule.weighted_sum(uses, weights), torch.einsum("b,bvd->vd", weights, expected))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_both_ways_with_repeated_ids_agree(share, monkeypatch):
    monkeypatch.setattr(embedding, "_MANY_REPEATED", share)
    module, batch = nn.Embedding(5, 3).double(), (torch.randint(0, 5, (4, 6)),)
    policy = Flat(0.1)
    assert relative_error(captured_sum(module, batch, loss, policy), reference(module, batch, loss, policy)) < 1e-9


def _all_in_one_group(monkeypatch):
    kind = type(Convolution.rules["weight"])
    plain = kind.norms_by
    monkeypatch.setattr(kind, "norms_by", lambda self, way, uses: plain(self, ConvolutionStrategy.PIXELS, uses))


def _padding_learns(monkeypatch):
    plain = embedding.Lookup.__init__
    monkeypatch.setattr(embedding.Lookup, "__init__", lambda self, **options: plain(self))


def _one_place_alone(monkeypatch):
    wrong = staticmethod(lambda uses: uses[0].gradient.flatten(2)[:, :, 0])
    monkeypatch.setattr(type(Convolution.rules["bias"]), "per_example", wrong)


def _mean_left_in(monkeypatch):
    wrong = lambda use: (use.data[0], torch.zeros_like(use.data[1]), use.data[2])  # noqa: E731
    monkeypatch.setattr(normalization, "_three", wrong)


def _first_use_alone(monkeypatch):
    kind = type(Convolution.rules["weight"])
    plain = kind.per_example
    monkeypatch.setattr(kind, "per_example", lambda self, uses: plain(self, Uses((uses[0],))))


def _repeated_ids_apart(monkeypatch):
    wrong = lambda ids, gradient, entries: gradient.square().sum((1, 2))  # noqa: E731
    monkeypatch.setattr(embedding, "segment_norms", wrong)


def _reset_gate_open(monkeypatch):
    kind = type(cells.CELLS["gru"])
    plain = kind.backward

    def wrong(self, *args):
        result = plain(self, *args)
        return cells.Gradients(result.inputs, result.inputs, result.first)

    monkeypatch.setattr(kind, "backward", wrong)


def _states_one_step_late(monkeypatch):
    monkeypatch.setattr(cells.Run, "before", cells.Run.outputs)


def _keys_frozen(monkeypatch):
    plain = attention._pieces

    def wrong(call, t, sizes):
        pieces = plain(call, t, sizes)
        return [pieces[0], *(p.as_subclass(torch.Tensor).detach() for p in pieces[1:])]

    monkeypatch.setattr(attention, "_pieces", wrong)


PLANTED = [
    ("conv2d, groups", _all_in_one_group),
    ("conv2d, stride", _one_place_alone),
    ("conv2d, used twice", _first_use_alone),
    ("embedding: padding", _padding_learns),
    ("embedding: repeated", _repeated_ids_apart),
    ("layer norm over all axes", _mean_left_in),
    ("GRU, two", _reset_gate_open),
    ("LSTM, two", _states_one_step_late),
    ("GRU, packed", _reset_gate_open),
    ("LSTM, packed", _states_one_step_late),
    ("cross, two sources", _keys_frozen),
]


@pytest.mark.parametrize(("row", "plant"), PLANTED, ids=[plant.__name__.strip("_") for _, plant in PLANTED])
def test_a_planted_bug_is_caught(row, plant, monkeypatch):
    case = next(case for case in CASES if row in str(case))
    module, batch, policy = case.module().double(), case.inputs(3, torch.float64), Flat(1e-2)
    good = reference(module, batch, loss, policy)
    assert relative_error(captured_sum(module, batch, loss, policy), good) < 1e-9
    plant(monkeypatch)
    assert relative_error(captured_sum(module, batch, loss, policy), good) > 1e-4


REFUSED = {
    "max_norm": (lambda: nn.Embedding(4, 3, max_norm=1.0), torch.zeros(2, 3, dtype=torch.int64), "max_norm"),
    "scale_grad_by_freq": (
        lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), torch.zeros(2, 3, dtype=torch.int64), "scale_grad_by_freq",
    ),
    "sparse": (lambda: nn.Embedding(4, 3, sparse=True), torch.zeros(2, 3, dtype=torch.int64), "sparse"),
    "running statistics": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), torch.randn(2, 4, 3), "running statistics",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_mix_examples_are_refused_before_anything_changes(what):
    factory, x, message = REFUSED[what]
    module = factory()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=message):
        recorded_of(module, (x,), loss)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_inputs_without_a_batch_are_refused():
    with pytest.raises(UnsupportedModelError, match="which rows"):
        recorded_of(nn.Conv2d(2, 3, 2), (torch.randn(2, 4, 4),), loss, learn=False)


def test_no_ordinary_weight_gradient_is_computed_on_the_way_back(monkeypatch):
    masks = []
    plain = torch.ops.aten.convolution_backward.default

    def counted(*args):
        masks.append(tuple(args[-1]))
        return plain(*args)

    monkeypatch.setattr("privet.gradients.rules.convolution._backward", counted)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    recorded_of(module, (torch.randn(3, 2, 8, 8),), loss)
    assert masks == [(True, False, False)]


def test_kept_memory_never_aliases_what_is_alive():
    like = torch.zeros(1)
    first = pool.scratch((400, 400), like).fill_(1.0)
    view = first[3:5]
    second = pool.scratch((400, 400), like).fill_(2.0)
    assert float(first.sum()) == 400 * 400
    address = second.data_ptr()
    del first, second
    assert pool.scratch((400, 400), like).data_ptr() == address
    third = pool.scratch((400, 400), like)
    fourth = pool.scratch((400, 400), like)
    third.fill_(3.0)
    fourth.fill_(4.0)
    assert float(view.sum()) == 2 * 400, "a view alone keeps its memory"


@pytest.mark.parametrize("shape", [(16, 3), (16, 12), (3, 12)])
def test_rows_are_kept_only_where_they_fit(shape):
    channels, size = shape
    x, weight = torch.randn(5, channels, size, size), torch.randn(32, channels, 3, 3)
    operation = Convolution(torch.conv2d, Geometry((1, 1), (1, 1), (1, 1), 1))
    use = Use(operation, "weight", (x,), operation.forward((x,), {"weight": weight}), tuple(weight.shape))
    pairing = Pairing(x, use.gradient, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    keeping = {ConvolutionStrategy.ROWS}
    assert convolution_strategy(pairing, budget=0) not in keeping
    assert convolution_strategy(pairing) in keeping | {ConvolutionStrategy.PIXELS}
    for strategy in ConvolutionStrategy:
        uses = Uses((use,))
        operation.rules["weight"].norms_by(strategy, uses)
        assert (uses.rows_memo is not None) == (strategy in keeping)


def test_a_slot_shares_its_rule_with_the_linear_operation():
    assert recurrent.Slot.rules["weight"] is Linear().rules["weight"]


class TimeMajor(nn.Module):
    """A convolution that sees positions and batch on one axis, positions outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 3, 2)

    def forward(self, x):
        steps = x.shape[1]
        return self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (steps, -1)).transpose(0, 1)


def test_rows_merged_with_the_batch_inside_belong_to_their_examples():
    module, batch = TimeMajor().double(), (torch.randn(4, 3, 2, 5, dtype=torch.float64),)
    capture, recorded = Capture(trainable(module), batch_first=False), Recorded(examples=4)
    learn_layouts(capture, lambda b: (loss(module, b),), batch, examples=4)
    capture.begin(4, recorded)
    losses = loss(module, batch)
    capture.end()
    losses.sum().backward()
    total = clipped_sum(recorded, trainable(module), Flat(1e-2)).values
    assert relative_error(total, reference(module, batch, loss, Flat(1e-2))) < 1e-9
