"""The modes that show per-example gradients: what is where, when, and that the sum is the reference's."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import BudgetExceededError, ConfigurationError, Flat, PrivacyEngine, ProtocolError
from privet.clipping import ClippingPolicy, PerLayer
from privet.errors import UnsupportedModelError
from privet.gradients import register_rule
from privet.gradients.reference import example_gradients
from privet.gradients.rules import custom
from privet.training.virtual_steps import BatchMemoryManager
from tests.contracts.doors import Expected, assert_exact, distance, expected_sum, paper_sum, reference, size
from tests.contracts.zoo import ZOO, batch_of, model_of, plain
from tests.gradients.rule_cases import CASES, Case
from tests.gradients.rule_cases import loss as case_loss

MODES = ("hooks", "functorch")
B = 4

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


class Run:
    """A small network under the paper's door, with a learning rate that leaves it where it is."""

    def __init__(self, mode="hooks", *, noise=0.0, reduction="mean", clip=0.5, clipping="flat", lr=0.0, n=16) -> None:
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))
        self.plain = copy.deepcopy(self.net)
        self.reduction = reduction
        self.engine = PrivacyEngine(accountant="rdp")
        data = TensorDataset(torch.randn(n, 3), torch.randint(2, (n,)))
        self.x, self.y = data.tensors[0][:B], data.tensors[1][:B]
        _, self.optimizer, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=torch.optim.SGD(self.net.parameters(), lr=lr),
            data_loader=DataLoader(data, batch_size=B),
            noise_multiplier=noise,
            max_grad_norm=clip,
            clipping=clipping,
            loss_reduction=reduction,
            grad_sample_mode=mode,
        )

    def backward(self, examples=B) -> None:
        F.cross_entropy(self.net(self.x[:examples]), self.y[:examples], reduction=self.reduction).backward()

    def rows(self, examples=B) -> dict[str, Tensor]:
        singles = [(self.x[i : i + 1], self.y[i : i + 1]) for i in range(examples)]
        return example_gradients(self.plain, singles, lambda m, b: F.cross_entropy(m(b[0]), b[1]))

    def attribute(self, name: str) -> dict[str, Tensor]:
        return {n: getattr(p, name) for n, p in self.net.named_parameters()}


def near(found, expected) -> bool:
    """Rows are compared with their own size, and sums of rows with the sizes of what was added up."""
    terms = expected.terms if isinstance(expected, Expected) else size(expected)
    return distance(found, expected) <= 1e-5 * max(terms, 1e-3)


def scaled_down(total: Expected, divisor: float) -> Expected:
    return Expected({name: v / divisor for name, v in total.items()}, terms=total.terms / divisor)


# -- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        # Each rule in one of the modes, half of them in each; the rest with the deep tests.
        pytest.param(case, mode, id=f"{case}-{mode}", marks=[pytest.mark.deep] if (i + j) % 2 else [])
        for i, case in enumerate(CASES)
        for j, mode in enumerate(MODES)
        if mode != "functorch" or case.mapped
    ],
)
def test_every_rule_gives_the_sum_of_the_reference(case: Case, mode):
    module, batch, policy = case.module().double(), case.inputs(3, torch.float64), PerLayer(1.0)
    found = paper_sum(module, batch, loss=case_loss, policy=policy, grad_sample_mode=mode)
    assert_exact(found, reference(module, batch, case_loss, policy))  # other policies: test_modes_by_policy.py


def test_functorch_names_an_operation_whose_result_has_the_batch_on_another_axis():
    (case,) = (case for case in CASES if not case.mapped)
    with pytest.raises(UnsupportedModelError, match="batch on axis 0"):
        paper_sum(
            case.module(), case.inputs(4, torch.float32), loss=case_loss, policy=Flat(1.0), grad_sample_mode="functorch"
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_use_a_parameter_gives_the_sum_of_the_reference(name, mode):
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    for policy in (Flat(0.7), PerLayer(0.7)):
        expected = reference(plain(model), batch, loss, policy)
        assert_exact(paper_sum(model, batch, loss=loss, policy=policy, grad_sample_mode=mode), expected)


def scaled(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return case_loss(module, batch[:-1]) * batch[-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES[::12], ids=str)
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(case: Case, mode):
    module, batch = case.module(), case.inputs(5, torch.float32)

    def found(policy: ClippingPolicy, examples: int, scale: float = 1.0) -> dict[str, Tensor]:
        factors = torch.ones(5).index_fill(0, torch.tensor([4]), scale)
        part = tuple(t[:examples] for t in (*batch, factors))
        return paper_sum(module, part, loss=scaled, policy=policy, grad_sample_mode=mode)

    for policy in (Flat(1e-3), PerLayer(1e-3)):
        without = found(policy, 4)
        for scale in (1e-15, 1.0, 1e15, math.inf, math.nan):
            moved = distance(found(policy, 5, scale), without)
            assert moved <= policy.sensitivity * (1 + 1e-4), scale
            assert math.isfinite(scale) or moved < 1e-7
            assert scale not in {1.0, 1e15} or moved > 0.3 * policy.sensitivity


@pytest.mark.parametrize("mode", MODES)
def test_the_test_of_sensitivity_and_that_of_the_sum_can_fail(mode, monkeypatch):
    module, batch = nn.Linear(3, 2), (torch.randn(3, 3),)
    honest = paper_sum(module, batch, loss=case_loss, policy=Flat(1e-3), grad_sample_mode=mode)
    monkeypatch.setattr(Flat, "weights", lambda self, squared_norms: torch.ones_like(squared_norms))
    lax = paper_sum(module, batch, loss=case_loss, policy=Flat(1e-3), grad_sample_mode=mode)
    assert size(honest) <= 3e-3 * (1 + 1e-5)
    assert distance(lax, honest) > 1e-2


# -- what is where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_attributes_are_those_of_the_papers_appendix(mode, reduction):
    run = Run(mode, reduction=reduction)
    assert all(v is None for name in ("grad_sample", "summed_grad") for v in run.attribute(name).values())
    for examples in (B, 3):
        run.backward(examples)
        rows = run.rows(examples)
        ordinary = scaled_down(expected_sum(rows, Flat(1e6)), examples if reduction == "mean" else 1)
        assert near(run.attribute("grad_sample"), rows)
        assert near(run.attribute("grad"), ordinary)
        assert all(v is None for v in run.attribute("summed_grad").values())

        run.optimizer.step()
        clipped = expected_sum(rows, Flat(0.5))
        divided = scaled_down(clipped, B if reduction == "mean" else 1)
        assert near(run.attribute("grad_sample"), rows)
        assert near(run.attribute("summed_grad"), clipped)
        assert near(run.attribute("grad"), divided)

        run.optimizer.zero_grad()
        for name in ("grad", "grad_sample", "summed_grad"):
            assert all(v is None for v in run.attribute(name).values()), name


@pytest.mark.parametrize("mode", MODES)
def test_noise_reaches_the_gradient_and_not_the_sum(mode):
    run = Run(mode, noise=2.0)
    run.backward()
    run.optimizer.step()
    assert near(run.attribute("summed_grad"), expected_sum(run.rows(), Flat(0.5)))
    sums = {name: v / B for name, v in run.attribute("summed_grad").items()}
    moved = distance(run.attribute("grad"), sums)
    count = sum(v.numel() for v in sums.values())
    assert 0.5 < moved / (2.0 * 0.5 / B * count**0.5) < 1.5


def test_auto_shows_and_keeps_nothing():
    run = Run("auto")
    run.backward()
    assert all(not hasattr(p, "grad_sample") and p.grad is None for p in run.net.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_over_the_loader(mode):
    run = Run(mode, noise=1.0, lr=0.1)
    for _ in range(2):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            F.cross_entropy(run.net(x), y).backward()
            assert all(len(r) == len(x) for r in run.attribute("grad_sample").values())
            run.optimizer.step()
    assert 0 < run.engine.get_epsilon(1e-5) < math.inf


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_has_no_rows_and_takes_its_noisy_step(mode):
    run = Run(mode, noise=1.0)
    run.backward(0)
    for name, p in run.net.named_parameters():
        assert p.grad_sample.shape == (0, *p.shape), name
        assert not p.grad.any()
    run.optimizer.step()
    assert all(not p.summed_grad.any() and p.grad.any() for p in run.net.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_without_a_use_has_rows_of_zeros(mode):
    model, batch = model_of("unused parameter"), batch_of("unused parameter", 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 2)), batch_size=2),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    ZOO["unused parameter"].loss(model, batch).mean().backward()
    assert all(p.grad_sample.shape == (3, *p.shape) for p in model.parameters())
    assert any(not p.grad_sample.any() for p in model.parameters())


def test_functorch_asks_no_rule(monkeypatch):
    def boom(*rest):
        raise AssertionError("a rule was asked")

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

    monkeypatch.setattr(custom, "_MODULES", {})
    register_rule(Scale)(boom)
    for kind in ("linear", "normalization", "embedding", "convolution"):
        module = __import__(f"privet.gradients.rules.{kind}", fromlist=["x"])
        for rule in [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]:
            if hasattr(rule, "per_example"):
                monkeypatch.setattr(rule, "per_example", boom)
    net = nn.Sequential(nn.Linear(3, 3), Scale(), nn.LayerNorm(3))
    batch = (torch.randn(3, 3),)
    expected = reference(net, batch, case_loss, Flat(0.1))
    assert_exact(paper_sum(net, batch, loss=case_loss, policy=Flat(0.1), grad_sample_mode="functorch"), expected)
    with pytest.raises(AssertionError, match="a rule was asked"):
        paper_sum(net, batch, loss=case_loss, policy=Flat(0.1), grad_sample_mode="hooks")


class ByStep(nn.Module):
    """A matrix of which each row meets a step of a sequence, the batch on axis 1 or merged with the steps."""

    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.table, self.mix, self.merged = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2)), merged

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 4)
        if self.merged:
            return torch.einsum("ni,io->no", x.flatten(0, 1), self.mix).view(-1, 6) * self.table.sum()
        steps = torch.einsum("tbi,ti->tb", x.transpose(0, 1), self.table)
        return steps.t() * self.mix.sum()


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize("merged", [False, True])
def test_vmap_finds_examples_that_are_not_on_axis_0(mode, merged):
    module, batch = ByStep(merged=merged).double(), (torch.randn(5, 3, 4, dtype=torch.float64),)
    expected = reference(module, batch, case_loss, Flat(0.1))
    assert_exact(paper_sum(module, batch, loss=case_loss, policy=Flat(0.1), grad_sample_mode=mode), expected)


def test_vmap_runs_under_the_autocast_of_the_forward():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
    batch = (torch.randn(5, 3),)

    def mixed(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch[0]).float().square().sum(1)

    expected = reference(net, batch, mixed, Flat(0.1))
    found = paper_sum(net, batch, loss=mixed, policy=Flat(0.1), grad_sample_mode="functorch")
    assert_exact(found, expected, tolerance=2e-2)


# -- rows of the user's own ------------------------------------------------------------------------------------------


def test_rows_that_the_user_changed_are_those_that_are_clipped():
    run = Run()
    run.backward()
    for p in run.net.parameters():
        p.grad_sample = p.grad_sample * 3
        p.grad_sample[1] = 0
    run.optimizer.step()
    rows = {name: r * 3 * torch.tensor([1.0, 0, 1, 1]).view(-1, *[1] * (r.dim() - 1)) for name, r in run.rows().items()}
    assert near(run.attribute("summed_grad"), expected_sum(rows, Flat(0.5)))


def test_rows_that_the_user_computed_without_any_backward_are_served():
    run = Run(clipping="per_layer")
    run.net.eval()
    values = {name: p.detach() for name, p in run.net.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(run.net, values, x[None]), y[None])

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, run.x, run.y)
    for _ in range(2):
        for name, p in run.net.named_parameters():
            p.grad_sample = rows[name].clone()
        run.optimizer.step()
        assert near(run.attribute("summed_grad"), expected_sum(run.rows(), PerLayer(0.5)))
    run.optimizer.zero_grad()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [Flat(0.5), PerLayer(0.5)], ids=["flat", "per layer"])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_not_finite_weighs_nothing(mode, policy, value):
    run = Run(mode, clipping=policy)
    run.backward()
    next(run.net.parameters()).grad_sample[2, 0, 0] = value
    run.optimizer.step()
    rows = {name: r[[0, 1, 3]] for name, r in run.rows().items()}
    assert near(run.attribute("summed_grad"), expected_sum(rows, policy))


WRONG = {
    "not enough rows": (lambda p: p.grad_sample[:-1], "numbers of examples differ"),
    "too many axes": (lambda p: p.grad_sample[None], "has shape"),
    "one example without its axis": (lambda p: p.grad_sample[0], "has shape"),
    "a scalar": (lambda p: torch.tensor(1.0), "has shape"),
    "None": (lambda p: None, "NoneType"),
    "a list": (lambda p: [p.grad_sample], "list"),
    "whole numbers": (lambda p: torch.zeros_like(p.grad_sample, dtype=torch.int64), "int64"),
    "sparse": (lambda p: p.grad_sample.to_sparse(), "sparse"),
    "elsewhere": (lambda p: p.grad_sample.to("meta"), "meta"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_refused_with_everything_that_is_wrong(what):
    run = Run(noise=1.0)
    run.backward()
    before = copy.deepcopy(run.net.state_dict())
    change, found = WRONG[what]
    good = {}
    for name in ("0.weight", "3.bias"):
        p = run.net.get_parameter(name)
        good[name], p.grad_sample = p.grad_sample, change(p)
    with pytest.raises(ConfigurationError, match=found) as caught:
        run.optimizer.step()
    assert "0.weight" in str(caught.value)
    assert "3.bias" in str(caught.value)
    assert not run.engine.ledger.phases
    assert all(torch.equal(v, before[name]) for name, v in run.net.state_dict().items())
    for name, rows in good.items():  # mended, it goes on
        run.net.get_parameter(name).grad_sample = rows
    run.optimizer.step()
    assert near(run.attribute("summed_grad"), expected_sum(run.rows(), Flat(0.5)))


# -- calls out of order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_calls_out_of_order_are_refused(mode):
    run = Run(mode)
    with pytest.raises(ProtocolError, match="no backward"):
        run.optimizer.step()
    run.backward()
    with pytest.raises(ProtocolError, match="second backward"):
        run.backward()
    with pytest.raises(ProtocolError, match="zero_grad"):
        run.optimizer.zero_grad()
    run.optimizer.step()
    with pytest.raises(ProtocolError, match="no backward"):  # the rows are still there, and were released
        run.optimizer.step()
    run.backward()  # without zero_grad in between
    assert near(run.attribute("grad_sample"), run.rows())
    run.optimizer.step()


def test_part_of_the_rows_left_from_the_last_step_is_refused():
    run = Run()
    run.backward()
    run.optimizer.step()
    run.net[0].weight.grad_sample = run.net[0].weight.grad_sample.clone()
    with pytest.raises(ConfigurationError, match="rows of the last step"):
        run.optimizer.step()


def test_a_step_that_is_refused_leaves_no_gradient_that_was_not_private():
    run = Run(noise=0.5, lr=1.0)
    run.engine.set_budget(epsilon=0.1, delta=1e-5)
    run.backward()
    before = copy.deepcopy(run.net.state_dict())
    with pytest.raises(BudgetExceededError):
        run.optimizer.step()
    assert all(p.grad is None for p in run.net.parameters())
    assert all(torch.equal(v, before[name]) for name, v in run.net.state_dict().items())


def test_a_parameter_frozen_between_backward_and_step_is_not_moved():
    run = Run(lr=1.0)
    run.backward()
    first = run.net[0].weight
    before = first.detach().clone()
    first.requires_grad_(False)
    run.optimizer.step()
    assert first.grad is None
    assert torch.equal(first, before)


def test_an_optimizer_whose_step_calls_that_of_its_base_steps_once():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    net = nn.Linear(3, 2)
    optimizer = Twice(net.parameters(), lr=0.0)
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 3)), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="hooks",
    )
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(3, 3)).square().mean().backward()
        optimizer.step()
    assert sum(phase.count for phase in engine.ledger.phases) == 2


def test_a_closure_is_served():
    run = Run()

    def closure():
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.net(run.x), run.y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.optimizer.step(closure)
    assert near(run.attribute("summed_grad"), expected_sum(run.rows(), Flat(0.5)))


def test_a_mode_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match="'auto', 'hooks', 'functorch'"):
        Run("ghost")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("most", [1, 3, 100])
def test_physical_batches_add_up_to_one_clipped_sum(mode, most):
    run = Run(mode)
    steps = []
    run.optimizer.register_step_post_hook(lambda *rest: steps.append(run.attribute("summed_grad")))
    seen: list[tuple[Tensor, Tensor]] = []
    sizes = []
    with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=most, optimizer=run.optimizer) as loader:
        for x, y in loader:
            run.optimizer.zero_grad()
            F.cross_entropy(run.net(x), y).backward()
            assert all(len(r) == len(x) for r in run.attribute("grad_sample").values())
            sizes.append(len(x))
            seen += zip(x, y, strict=True)
            taken_before = len(steps)
            run.optimizer.step()
            if len(steps) > taken_before:
                rows = example_gradients(
                    run.plain, [(a[None], b[None]) for a, b in seen], lambda m, b: F.cross_entropy(m(b[0]), b[1])
                )
                assert near(steps[-1], expected_sum(rows, Flat(0.5)))
                seen = []
    assert len(steps) == len(run.loader)
    assert max(sizes) <= most


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_after_a_step_that_failed_midway_the_next_one_is_private(mode):
    class Failing(torch.optim.SGD):
        failures = 1

        def step(self, closure=None):
            self.failures -= 1
            if self.failures >= 0:
                raise ArithmeticError
            return super().step(closure)

    net = nn.Linear(3, 2).double()
    twin, batch = copy.deepcopy(net), (torch.randn(3, 3, dtype=torch.float64),)
    optimizer = Failing(net.parameters(), lr=0.0)
    PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 3)), batch_size=2),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        loss_reduction="sum",
        grad_sample_mode=mode,
    )
    case_loss(net, batch).sum().backward()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    case_loss(net, batch).sum().backward()
    optimizer.step()
    assert_exact({n: p.grad for n, p in net.named_parameters()}, reference(twin, batch, case_loss, Flat(0.1)))
