"""Law 5: only a private gradient reaches an optimizer, whoever steps, and what steps by hand is on the ledger."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Budget, CoverageError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep, ProtocolError
from privet.training import guard

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
SHOWING = ("hooks", "functorch")
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))


class Run:
    def __init__(self, mode: str = "hooks", budget: Budget | None = None, **options: Any) -> None:
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.older = torch.optim.SGD(self.net.parameters(), lr=0.1)  # made before training became private
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.engine = PrivacyEngine(budget=budget)
        *_, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(TensorDataset(torch.zeros(32, 3)), batch_size=8),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,  # type: ignore[arg-type]
            **options,
        )

    def backward(self) -> None:
        self.net(X).square().mean().backward()

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# -- other optimizers --------------------------------------------------------------------------------------------------


class OfItsOwn(torch.optim.Optimizer):
    """An optimizer of the user's own, whose step is its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.1 * p.grad)


OTHERS: dict[str, Callable[[Run], Any]] = {
    "made before": lambda run: run.older,
    "made after": lambda run: torch.optim.SGD(run.net.parameters(), lr=0.1),
    "foreach": lambda run: torch.optim.SGD(run.net.parameters(), lr=0.1, foreach=True),
    "fused": lambda run: torch.optim.AdamW(run.net.parameters(), lr=0.1, fused=True),
    "of one parameter": lambda run: torch.optim.Adam([next(run.net.parameters())]),
    "a shallow copy": lambda run: copy.copy(run.optimizer),
    "of its own": lambda run: OfItsOwn(run.net.parameters()),
}


@pytest.mark.parametrize("mode", SHOWING)
@pytest.mark.parametrize("other", OTHERS)
def test_no_other_optimizer_steps_on_what_is_shown(mode: str, other: str) -> None:
    run = Run(mode)
    optimizer, before = OTHERS[other](run), run.values()
    run.backward()
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="which is private"):
            optimizer.step()
    run.net[0].weight.grad = run.net[0].weight.grad * 2  # a new tensor is no way around
    with pytest.raises(ProtocolError, match="which is private"):
        optimizer.step()
    assert same(before, run.values())
    run.optimizer.step()
    assert 0.0 < run.engine.get_epsilon(1e-5) < math.inf


@pytest.mark.parametrize("mode", [*SHOWING, "auto"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_second_step_on_a_private_gradient_is_post_processing(mode: str, other: str) -> None:
    run = Run(mode)
    optimizer = OTHERS[other](run)
    run.backward()
    run.optimizer.step()
    epsilon, before = run.engine.get_epsilon(1e-5), run.values()
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
    optimizer.step()
    assert not same(before, run.values())
    assert run.engine.get_epsilon(1e-5) == epsilon


def test_by_default_another_optimizer_finds_no_gradient_before_the_step() -> None:
    run = Run("auto")
    before = run.values()
    run.backward()
    run.older.step()
    assert same(before, run.values())
    for p in run.net.parameters():
        p.grad = torch.ones_like(p)  # nobody released it
    with pytest.raises(ProtocolError, match="which is private"):
        run.older.step()
    assert same(before, run.values())
    run.optimizer.step()
    assert run.engine.ledger.steps == 1


def test_the_modules_zero_grad_does_not_hide_what_is_pending() -> None:
    """The loop of an ordinary script whose optimizer was made after training became private."""
    run = Run("hooks")
    optimizer = torch.optim.SGD(run.net.parameters(), lr=0.1)
    before = run.values()
    run.net.zero_grad()
    run.backward()
    with pytest.raises(ProtocolError, match="zero_grad"):
        run.net.zero_grad()
    with pytest.raises(ProtocolError, match="which is private"):
        optimizer.step()
    assert same(before, run.values())


def test_ordinary_training_beside_it_is_left_alone() -> None:
    run = Run("hooks")
    run.backward()
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.weight.detach().clone()
    net(X).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.weight)
    twin = copy.deepcopy(run.net)
    for p in twin.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    run.optimizer.step()


# -- changes by hand ---------------------------------------------------------------------------------------------------


def _subtract(p: nn.Parameter) -> None:
    p.sub_(0.1 * p.grad)


def _data(p: nn.Parameter) -> None:
    p.data -= 0.1 * p.grad


def _swapped(p: nn.Parameter) -> None:
    p.data = p.data - 0.1 * p.grad


def _foreach(p: nn.Parameter) -> None:
    torch._foreach_add_([p], [p.grad], alpha=-0.1)


def _vector(p: nn.Parameter) -> None:
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector([p - 0.1 * p.grad]), [p])


def _numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[...] -= 0.1 * p.grad.numpy()


def _one_entry(p: nn.Parameter) -> None:
    p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(math.inf))


def _hooks_left_out(p: nn.Parameter) -> None:
    torch.optim.SGD.step.__wrapped__(torch.optim.SGD([p], lr=0.1))  # type: ignore[attr-defined]


BY_HAND = (_subtract, _data, _swapped, _foreach, _vector, _numpy, _one_entry, _hooks_left_out)


@pytest.mark.parametrize("by_hand", BY_HAND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("budget", [None, Budget(3.0, 1e-5)], ids=["", "budget"])
def test_a_change_by_hand_makes_epsilon_infinite(by_hand: Callable[[Any], None], budget: Budget | None) -> None:
    run = Run("hooks", budget)
    run.backward()
    assert run.engine.get_epsilon(1e-5) == 0.0
    with torch.no_grad():
        by_hand(run.net[0].weight)
    assert run.engine.get_epsilon(1e-5) == math.inf
    assert run.engine.budget == budget
    assert "a parameter changed while p.grad was not private" in run.engine.ledger.marks


def _give_up(run: Run) -> None:
    for p in run.net.parameters():
        p.grad_sample = None


WAYS_ON: dict[str, Callable[[Run], Any]] = {
    "step": lambda run: run.optimizer.step(),
    "given up, forward": lambda run: (_give_up(run), run.backward()),
    "given up, zero_grad": lambda run: (_give_up(run), run.optimizer.zero_grad()),
    "given up, zero_grad of the module": lambda run: (_give_up(run), run.net.zero_grad(), run.backward()),
}


@pytest.mark.parametrize("way", WAYS_ON)
def test_a_change_by_hand_is_noticed_whatever_comes_next(way: str) -> None:
    run = Run("hooks")
    run.backward()
    with torch.no_grad():
        _subtract(run.net[2].bias)
    with pytest.raises(ProtocolError, match="epsilon is infinite"):
        WAYS_ON[way](run)
    assert run.engine.ledger.epsilon(1e-5) == math.inf


def test_a_change_by_hand_is_in_what_is_saved(tmp_path: Path) -> None:
    for save in ("checkpoint", "door", "optimizer"):
        run, other = Run("hooks"), Run("hooks")
        run.backward()
        with torch.no_grad():
            _subtract(run.net[0].weight)
        if save == "checkpoint":
            run.engine.save_checkpoint(tmp_path / "c.pt", module=run.net, optimizer=run.optimizer)
            other.engine.load_checkpoint(tmp_path / "c.pt", module=other.net, optimizer=other.optimizer)
        elif save == "door":
            other.engine.load_state_dict(run.engine.state_dict())
        else:
            other.optimizer.load_state_dict(run.optimizer.state_dict())
        assert other.engine.get_epsilon(1e-5) == math.inf, save


@pytest.mark.parametrize("mode", SHOWING)
def test_what_the_loop_does_between_steps_is_no_change_by_hand(mode: str) -> None:
    run = Run(mode)
    average = torch.optim.swa_utils.AveragedModel(run.net)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    best = copy.deepcopy(run.net.state_dict())
    for turn in range(6):
        run.optimizer.zero_grad() if turn % 2 else run.net.zero_grad()
        run.backward()
        with torch.no_grad():
            run.net(X)
        run.optimizer.step()
        scheduler.step()
        average.update_parameters(run.net)
        with torch.no_grad():
            run.net[0].weight.clamp_(-1.0, 1.0)
        if turn == 3:
            run.net.load_state_dict(best)
    with torch.no_grad():
        run.net[0].weight[0, 0] = math.nan
    run.backward()
    assert run.engine.get_epsilon(1e-5) < math.inf, "NaN is what it was"


def test_these_tests_would_see_a_comparison_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_same", lambda a, b: True)
    run = Run("hooks")
    run.backward()
    with torch.no_grad():
        _subtract(run.net[0].weight)
    assert run.engine.get_epsilon(1e-5) == 0.0


# -- the tripwire, after torch has swapped the insides of parameters ---------------------------------------------------


@pytest.fixture
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def _through_a_file(net: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file, weights_only=True))


SWAPS: dict[str, Callable[[nn.Module], Any]] = {
    "double": lambda net: net.double(),
    "there and back": lambda net: net.double().float(),
    "load_state_dict": _through_a_file,
}


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("mode", ["auto", *SHOWING])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.filterwarnings("ignore:weights were loaded:UserWarning")
def test_a_penalty_is_refused_after_parameters_were_swapped(swap: str, mode: str) -> None:
    run = Run(mode)
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    SWAPS[swap](run.net)
    before, x = run.values(), X.to(run.net[0].weight.dtype)
    loss = run.net(x).square().mean() + sum(p.square().sum() for p in run.net.parameters())
    with pytest.raises(CoverageError, match="a gradient reached"):
        loss.backward()
    assert all(p.grad is None for p in run.net.parameters())
    run.net(x).square().mean().backward()
    run.optimizer.step()
    assert not same(before, run.values())


@pytest.mark.usefixtures("_swapping")
def test_a_penalty_is_refused_after_a_swap_at_the_explicit_door() -> None:
    net = nn.Linear(3, 2)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.0)),
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        expected_batch_size=8.0,
    )
    step([X])
    net.double()
    step([X.double()])
    with pytest.raises(CoverageError, match="a gradient reached"):
        net.weight.square().sum().backward()
    assert net.weight.grad is None


@pytest.mark.usefixtures("_swapping")
def test_a_gradient_that_comes_right_after_a_swap_is_stepped_on_by_nobody() -> None:
    """Until the next forward no hook runs on the parameters, and none is needed: an optimizer refuses what it finds."""
    run = Run("auto")
    run.net.double()
    run.net[0].weight.square().sum().backward()
    with pytest.raises(ProtocolError, match="which is private"):
        run.older.step()
    with pytest.raises(ProtocolError, match="no backward"):
        run.optimizer.step()
