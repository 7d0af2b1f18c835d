"""passes=2: the same sum in two backwards, masks and buffers as in one, and memory near that of training alone."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from privet import ConfigurationError, CoverageError, Flat, Gaussian, Mechanism, Performance, Poisson, PrivateStep
from privet.clipping import ClippingPolicy, PerLayer
from privet.gradients.passes import two_pass
from privet.gradients.rows import row_norms
from privet.gradients.rules import convolution, linear, strategy
from privet.gradients.use import Use
from tests.contracts.doors import Expected, assert_exact, copied, distance, reference, size, taken, trainable
from tests.contracts.zoo import ZOO, batch_of, model_of, plain
from tests.gradients.rule_cases import CASES, Case
from tests.gradients.rule_cases import loss as case_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    yield
    torch.set_num_threads(threads)


def step_of(module, *, loss=case_loss, policy=None, passes=2, noise=0.0) -> PrivateStep:
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=policy or Flat(0.1), noise=Gaussian(noise))
    optimizer = torch.optim.SGD(trainable(module), lr=0.0)
    return PrivateStep(
        module,
        optimizer=optimizer,
        mechanism=mechanism,
        loss_per_example=loss,
        expected_batch_size=1,
        performance=Performance(passes=passes),
    )


def sums_of(module, *batches, loss=case_loss, policy=None, passes=2) -> list[dict[str, Tensor]]:
    """Returns the sum of each batch, in turn."""
    module = copied(module)
    step = step_of(module, loss=loss, policy=policy, passes=passes)
    seen = taken(module, step.optimizer)
    for batch in batches:
        step(batch)
    return seen


# Every other rule; the rest with the deep tests, and by policy in `test_modes_by_policy.py`.
HALF = [pytest.param(case, id=str(case), marks=[pytest.mark.deep] if i % 2 else []) for i, case in enumerate(CASES)]


@pytest.mark.parametrize("case", HALF)
def test_every_rule_gives_the_sum_of_the_reference(case: Case):
    module, batch = case.module().double(), case.inputs(3, torch.float64)
    for policy in (Flat(1e-2), Flat(1e6), PerLayer({"": 0.1}) if isinstance(module, nn.Embedding) else Flat(1.0)):
        expected = reference(module, batch, case_loss, policy)
        for found in sums_of(module, batch, batch, policy=policy):
            assert_exact(found, expected)


@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_use_a_parameter_gives_the_sum_of_the_reference(name):
    model, loss = model_of(name), ZOO[name].loss
    batches = [batch_of(name, n, seed=n) for n in (5, 1, 6)]
    for batch, found in zip(batches, sums_of(model, *batches, loss=loss, policy=Flat(0.7)), strict=True):
        assert_exact(found, reference(plain(model), batch, loss, Flat(0.7)))


# -- law 1 -----------------------------------------------------------------------------------------------------------


def scaled(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return case_loss(module, batch[:-1]) * batch[-1]


# A batch in doubt, as bags cut by offsets are, is refused where a gradient is not finite: see test_flat_bags.py.
@pytest.mark.parametrize("case", [case for case in CASES if "offset" not in str(case)][::3], ids=str)
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(case: Case):
    batch, policy = case.inputs(5, torch.float32), Flat(1e-3)
    scales = (1e-15, 1.0, 1e15, math.inf, math.nan)
    batches = [(*(t[:4] for t in batch), torch.ones(4))]
    batches += [(*batch, torch.ones(5).index_fill(0, torch.tensor([4]), scale)) for scale in scales]
    without, *found = sums_of(case.module(), *batches, loss=scaled, policy=policy)
    assert size(without) > 0
    for scale, more in zip(scales, found, strict=True):
        moved = distance(more, without)
        assert moved <= policy.sensitivity * (1 + 1e-4), scale
        assert math.isfinite(scale) or moved < 1e-7  # exactly nothing, but for the rounding of a batch of another size
        assert scale not in {1.0, 1e15} or moved > 0.3 * policy.sensitivity


SPOILT = {
    "the loss": lambda x, value: (x, torch.tensor([1.0, value, 1.0])),
    "the input": lambda x, value: (x.index_fill(0, torch.tensor([1]), value), torch.ones(3)),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_an_example_that_is_not_finite_adds_exactly_zero(spoilt, value):
    class Net(nn.Module):
        """A norm, a tied matrix and a derived one: each sums in a way of its own."""

        def __init__(self):
            super().__init__()
            self.first, self.norm, self.bare = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            h = self.norm(self.first(torch.tanh(self.first(x))))
            return h @ self.bare.t()

    def loss(module, batch):
        return module(batch[0]).square().sum(1) * batch[1]

    torch.manual_seed(1)
    net, x = Net(), torch.randn(3, 4)
    clean = (x, torch.tensor([1.0, 0.0, 1.0]))  # the same rows, of which the second one adds nothing
    _, expected, found = sums_of(net, clean, clean, SPOILT[spoilt](x, value), loss=loss, policy=Flat(0.5))
    assert all(v.isfinite().all() for v in found.values())
    if math.isfinite(value):
        assert distance(found, expected) <= 0.5 * (1 + 1e-5)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_batch_of_examples_none_of_which_is_finite_sums_to_zero():
    net = nn.Linear(3, 2)
    clean, spoilt = (torch.randn(4, 3),), (torch.full((4, 3), math.nan),)
    found = sums_of(net, clean, spoilt)[-1]
    assert all(not v.any() for v in found.values())


def test_the_tests_of_the_sum_can_fail(monkeypatch):
    """Three planted bugs: weights of one, no mask for what is not finite, norms of separate uses added up."""
    x = torch.randn(4, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()

    def twice(module, batch):
        return module(module(batch[0])).square().sum(1) * batch[1]

    batch, spoilt = (x, torch.ones(4).double()), (x, torch.tensor([1.0, math.nan, 1.0, 1.0]).double())
    expected = reference(net, batch, twice, Flat(0.1))
    assert_exact(sums_of(net, batch, loss=twice)[0], expected)

    with monkeypatch.context() as bug:
        real = two_pass.weights_of
        bug.setattr(two_pass, "weights_of", lambda policy, n, absent: (torch.ones_like(n), real(policy, n, absent)[1]))
        assert distance(sums_of(net, batch, loss=twice)[0], expected) > 0.1
    with monkeypatch.context() as bug:
        real_sums = two_pass.masked_sums
        bug.setattr(two_pass, "masked_sums", lambda *args: real_sums(*args[:3], None, *args[4:]))
        assert any(v.isnan().any() for v in sums_of(net, batch, spoilt, loss=twice)[1].values())
    with monkeypatch.context() as bug:
        real_put = two_pass._Norms.put

        def put(self, target, use):
            for name in two_pass._sources(target, self._parameters):
                if (name, 0) not in self._norms and name in self._norms:
                    self._norms[name, 0] = self._norms.pop(name)
                    self._parameters = {**self._parameters, (name, 0): self._parameters[name]}
            real_put(self, target, use)
            self.late.clear()

        bug.setattr(two_pass._Norms, "put", put)
        assert distance(sums_of(net, batch, loss=twice)[0], expected) > 1e-6


# -- one forward -----------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Dropout, a buffer that counts, and blocks that may be checkpointed."""

    def __init__(self, *, kind: str = "", width: int = 6, blocks: int = 2) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.5)) for _ in range(blocks))
        self.blocks, self.out, self.kind = nn.ModuleList(layers), nn.Linear(width, 2), kind
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.kind == "reentrant":
            x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.kind == "reentrant") if self.kind else block(x)
        return self.out(x)


@pytest.mark.parametrize("kind", ["", "reentrant", "not reentrant"])
def test_dropout_and_buffers_are_as_in_one_pass(kind):
    model, batch = Dropping(kind=kind).double(), (torch.randn(6, 6, dtype=torch.float64),)
    results = []
    for passes in (1, 2):
        module = copied(model)
        step = step_of(module, passes=passes)
        seen = taken(module, step.optimizer)
        torch.manual_seed(3)
        for _ in range(3):
            step(batch)
        results.append((seen, module.forwards.item(), torch.rand(1)))
    (first, forwards, after), (second, forwards_again, after_again) = results
    assert forwards == forwards_again == 3
    assert after == after_again
    for a, b in zip(first, second, strict=True):
        assert_exact(b, Expected(a, terms=6 * 0.1))  # six examples, clipped to 0.1
    assert distance(first[0], first[1]) > 1e-6, "the masks of two steps differ"


def test_the_model_runs_once_a_step():
    model, runs = nn.Linear(3, 2), []
    step = step_of(model, loss=lambda m, b: (runs.append(1), case_loss(m, b))[1])
    batch = (torch.randn(4, 3),)
    step(batch)
    runs.clear()
    step(batch)
    assert len(runs) == 1


class Growing(nn.Module):
    """Uses its matrix as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(4, 4), 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


def test_a_matrix_may_be_used_more_or_less_often_from_step_to_step():
    model = Growing().double()
    step = step_of(model)
    seen = taken(model, step.optimizer)
    for times in (1, 3, 2, 4, 1):
        model.times = times
        batch = (torch.randn(5, 4, dtype=torch.float64),)
        expected = reference(copied(_plain(model)), batch, case_loss, Flat(0.1))
        step(batch)
        assert_exact(seen[-1], expected)


def _plain(model: Growing) -> Growing:
    twin = Growing().double()
    twin.load_state_dict(model.state_dict())
    twin.times = model.times
    return twin


# -- memory ----------------------------------------------------------------------------------------------------------


class Watch:
    """Counts the uses that are alive while they come."""

    def __init__(self) -> None:
        self.uses: list[weakref.ref[Use]] = []
        self.most = 0

    def alive(self) -> int:
        return sum(use() is not None for use in self.uses)

    def on(self, monkeypatch, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def put(inner, target, use):
            self.uses.append(weakref.ref(use))
            real(inner, target, use)
            self.most = max(self.most, self.alive())

        monkeypatch.setattr(owner, name, put)


def _hoarding(real):
    """Returns a planted bug: a listener that keeps what it saw."""

    def put(self, target, use):
        self.kept = [*getattr(self, "kept", []), use]
        real(self, target, use)

    return put


@pytest.mark.parametrize("kind", ["", "reentrant", "not reentrant"])
def test_no_use_outlives_the_backward_of_its_operation(kind, monkeypatch):
    batch = (torch.randn(4, 6),)
    for planted in (False, True):
        with monkeypatch.context() as bug:
            if planted:
                bug.setattr(two_pass._Sums, "put", _hoarding(two_pass._Sums.put))
            step = step_of(Dropping(kind=kind, blocks=8))
            step(batch)
            watch = Watch()
            for owner in (two_pass._Norms, two_pass._Sums):
                watch.on(bug, owner, "put")
            step(batch)
        gc.collect()
        assert len(watch.uses) == 2 * 18
        assert watch.alive() == 0
        assert (watch.most > 10) if planted else (watch.most <= 2)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["matrix", "kernel"])
def test_the_rows_of_a_whole_batch_are_never_held_at_once(kind, passes, monkeypatch):
    """In one pass they are, to be summed: that is what shows that this would be seen."""
    module, batch = {
        "matrix": (nn.Linear(32, 64).double(), (torch.randn(40, 200, 32, dtype=torch.float64),)),
        "kernel": (nn.Conv2d(16, 16, 3).double(), (torch.randn(40, 16, 24, 24, dtype=torch.float64),)),
    }[kind]
    rows = 40 * module.weight.numel() * 8
    monkeypatch.setattr(strategy, "_CHUNK_BYTES", rows // 8)
    held = []

    def norms(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * 8)
        return row_norms(tensor)

    for user in (linear, convolution):
        monkeypatch.setattr(user, "row_norms", norms)
    step = step_of(module, policy=Flat(0.1), passes=passes)
    seen = taken(module, step.optimizer)
    step(batch)
    held.clear()  # those of the check on the first batch
    step(batch)
    assert_exact(seen[1], reference(module, batch, case_loss, Flat(0.1)))
    most = max(each for each in held if each > 40 * 64 * 8)  # of the weight, not of the bias
    assert most == rows if passes == 1 else most <= rows // 8


def test_nothing_is_left_in_the_parameters():
    model = Dropping()
    step = step_of(model, noise=1.0)
    step((torch.randn(4, 6),))
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    assert not step._capture.watching
    assert step._capture.cycle is None


# -- what is refused -------------------------------------------------------------------------------------------------


class Halves(ClippingPolicy):
    """Two groups."""

    sensitivity = 1.0

    def groups(self, names):
        return [i % 2 for i in range(len(names))]

    def weights(self, squared_norms):
        return 0.5 / squared_norms.sqrt().clamp(min=1.0)


@pytest.mark.parametrize("policy", [PerLayer(1.0), Halves()])
def test_several_weights_for_an_example_are_refused_at_construction(policy):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ConfigurationError, match="2 groups"):
        step_of(net, policy=policy)
    step_of(nn.Linear(3, 2, bias=False), policy=PerLayer(1.0))  # one layer is one group


@pytest.mark.parametrize("passes", [0, 3, True, "2", None, 2.5])
def test_another_number_of_passes_is_refused(passes):
    with pytest.raises(ConfigurationError, match=r"passes must be 1, 2 or .auto."):
        step_of(nn.Linear(3, 2), passes=passes)


def test_a_gradient_that_was_not_captured_trips_the_wire():
    net = nn.Linear(3, 2)
    penalty = [0.0]
    step = step_of(net, loss=lambda m, b: case_loss(m, b) + penalty[0] * m.weight.detach().sum())
    batch = (torch.randn(4, 3),)
    step(batch)
    step._loss._loss = lambda m, b: case_loss(m, b) + _unseen(net.weight)
    with pytest.raises(CoverageError, match="weight"):
        step(batch)
    assert all(p.grad is None for p in net.parameters())
    assert step._capture.cycle is None
    step._loss._loss = case_loss
    step(batch)


def _unseen(parameter: nn.Parameter) -> Tensor:
    """Returns a function of a parameter that capture does not see."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.square().sum()


def test_an_empty_batch_takes_its_noisy_step():
    net = nn.Linear(3, 2)
    step = step_of(net, noise=1.0)
    seen = taken(net, step.optimizer)
    step((torch.zeros(0, 3),))
    assert all(v.any() for v in seen[0].values())


@pytest.mark.parametrize("size_of_parts", [1, 2, 5])
def test_physical_batches_sum_to_the_logical_one(size_of_parts):
    net, batch = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), (torch.randn(5, 3).double(),)
    expected = reference(net, batch, case_loss, Flat(0.1))
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=Flat(0.1), noise=Gaussian(0.0))
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        mechanism=mechanism,
        loss_per_example=case_loss,
        expected_batch_size=1,
        performance=Performance(passes=2, physical_batch_size=size_of_parts),
    )
    seen = taken(net, step.optimizer)
    step(batch)
    assert_exact(seen[0], expected)
