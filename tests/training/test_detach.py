"""A way back: a module that was private is an ordinary one again, and what it had spent stays on the ledger."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import privet
from privet import BatchMemoryManager, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep, Schedule
from privet.errors import ConfigurationError, LedgerError, ProtocolError
from privet.training.update import update_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:a step was taken on a batch that did not come:UserWarning", "ignore:.*noise.*nothing:UserWarning"
)
MODES = ("auto", "hooks", "functorch")
TABLES = [name for name, value in vars(nn.Linear(1, 1)).items() if isinstance(value, dict) and "hook" in name]
OF_OPTIMIZERS = [name for name in vars(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)) if "hook" in name]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(seed: int = 1) -> TensorDataset:
    made = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(40, 5, generator=made), torch.randint(3, (40,), generator=made))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def private(module: nn.Module, engine: PrivacyEngine, optimizer: torch.optim.Optimizer | None = None, **options: Any):
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    optimizer = adam(module) if optimizer is None else optimizer
    return engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(data(), batch_size=8), **options
    )


def explicit(module: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> PrivateStep:
    mechanism = Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(1.0))
    return PrivateStep(
        module,
        optimizer=adam(module) if optimizer is None else optimizer,
        mechanism=mechanism,
        loss_per_example=loss,
        **{"expected_batch_size": 8, **options},
    )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    """The ordinary loop: that of a private module too."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()


def ordinary_batches() -> list[Any]:
    return [tuple(t[i : i + 8] for t in data(2).tensors) for i in (0, 8, 16)]


def left_on(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns everything on a module, its parameters and an optimizer that a new one of their class does not have."""
    found = [f"{n}.{t}" for n, m in module.named_modules() for t in TABLES if vars(m)[t]]
    plain = set(vars(nn.Linear(1, 1))) | set(vars(nn.Sequential())) | set(vars(nn.Tanh()))
    found += [f"{n}.{a}" for n, m in module.named_modules() for a in vars(m) if a not in plain]
    for name, p in module.named_parameters():
        found += [f"{name}.{a}" for a in vars(p)]
        found += [f"{name} is a {type(p).__name__}"] if type(p) is not nn.Parameter else []
        found += [f"{name} has a hook"] if p._post_accumulate_grad_hooks or p._backward_hooks else []
        found += [f"{name} has a gradient"] if p.grad is not None else []
    new = set(vars(adam(module)))
    found += [f"optimizer.{a}" for a in vars(optimizer) if a not in new]
    return found + [f"optimizer.{t}" for t in OF_OPTIMIZERS if vars(optimizer)[t]]


@pytest.mark.parametrize("mode", [*MODES, "explicit"])
def test_nothing_is_left_and_training_is_that_of_a_module_which_was_never_private(mode: str) -> None:
    module = net()
    if mode == "explicit":
        step = explicit(module)
        optimizer, ledger = step.optimizer, step.ledger
        for batch in step.batches(data()):
            step(batch)
            break
    else:
        engine = PrivacyEngine()
        module, optimizer, loader = private(module, engine, grad_sample_mode=mode)
        train(module, optimizer, loader)
        ledger = engine.ledger
    assert left_on(module, optimizer), "nothing was there to be taken away"
    other = net()
    other.load_state_dict(module.state_dict())
    others = adam(other)
    others.load_state_dict(copy.deepcopy({k: v for k, v in optimizer.state_dict().items() if k != "privet"}))
    spent = ledger.epsilon(1e-5)
    step.detach() if mode == "explicit" else engine.detach(module)
    assert left_on(module, optimizer) == []
    for each, theirs in ((module, optimizer), (other, others)):
        train(each, theirs, ordinary_batches())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert ledger.epsilon(1e-5) == spent  # what was billed stays, and no step after it is billed
    assert any("detached" in mark for mark in ledger.marks)
    assert "privet" not in optimizer.state_dict()
    with pytest.raises(ConfigurationError, match="not the optimizer of a private module"):
        update_of(optimizer)
    if mode == "explicit":
        with pytest.raises(ProtocolError, match=r"detach\(\) has ended it"):
            step(ordinary_batches()[0])


def test_a_part_that_is_left_behind_is_found() -> None:
    """The tests above look at all that there is: each planted remainder is seen."""
    plants = {
        "a hook": lambda m, o: m[0].register_forward_hook(lambda *rest: None),
        "an attribute": lambda m, o: setattr(m[2].weight, "grad_sample", None),
        "a step hook": lambda m, o: o.register_step_post_hook(lambda *rest: None),
        "a method": lambda m, o: setattr(o, "zero_grad", lambda *rest: None),
        "a tripwire": lambda m, o: m[0].bias.register_post_accumulate_grad_hook(lambda p: None),
    }
    for name, plant in plants.items():
        module = net()
        optimizer = adam(module)
        assert left_on(module, optimizer) == []
        plant(module, optimizer)
        assert len(left_on(module, optimizer)) == 1, name


def test_the_loader_is_heard_of_no_more_and_the_wrapped_method_comes_back() -> None:
    module, engine = net(), PrivacyEngine()
    optimizer, calls = adam(module), []
    optimizer.zero_grad = before = lambda set_to_none=True: calls.append(set_to_none)
    module, optimizer, loader = private(module, engine, optimizer)
    assert len(loader._listeners) == 1
    engine.detach(module)
    assert loader._listeners == []
    assert optimizer.zero_grad is before
    assert len(list(loader)) == 5


def test_a_schedule_and_an_engine_that_has_not_made_it_refuse() -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, _ = private(module, engine)
    schedule = Schedule(optimizer, noise=privet.Exponential(0.5))
    with pytest.raises(ProtocolError, match="not private here: this engine has made nothing private"):
        PrivacyEngine().detach(module)
    engine.detach(module)
    with pytest.raises(ProtocolError, match=r"the mechanism was to change, and .* not private any more"):
        schedule.step()
    with pytest.raises(ProtocolError, match="not private here"):
        engine.detach(module)


@pytest.mark.parametrize("mode", MODES)
def test_inside_a_step_it_is_refused_and_nothing_has_changed(mode: str) -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine, grad_sample_mode=mode)
    x, y = next(iter(loader))
    F.cross_entropy(module(x), y).backward()
    with pytest.raises(ProtocolError, match="inside a logical step"):
        engine.detach(module)
    optimizer.step()
    assert engine.ledger.steps == 1
    engine.detach(module)


def test_among_virtual_steps_it_is_refused() -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine, noise_generator=torch.Generator().manual_seed(3))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as physical:
        for x, y in physical:
            F.cross_entropy(module(x), y).backward()
            with pytest.raises(ProtocolError, match="BatchMemoryManager"):
                engine.detach(module)
            optimizer.step()
            break
    engine.detach(module)


# -- made private anew -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["the same engine", "another engine"])
def test_it_is_made_private_anew_with_fresh_noise_and_the_ledger_goes_on(same: bool) -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine)
    first = update_of(optimizer).noise
    train(module, optimizer, loader)
    engine.detach(module)
    again = engine if same else PrivacyEngine()
    module, optimizer, loader = private(module, again, optimizer, noise_multiplier=2.0, grad_sample_mode="hooks")
    assert update_of(optimizer).noise is not first
    train(module, optimizer, loader)
    twice = PrivacyEngine()
    for noise in (1.0, 2.0) if same else (2.0,):
        other = net()
        train(*private(other, twice, noise_multiplier=noise))
    assert again.get_epsilon(1e-5) == pytest.approx(twice.get_epsilon(1e-5), rel=1e-9)
    assert same != any("on another ledger" in mark for mark in again.ledger.marks)


def test_a_training_that_was_not_private_makes_epsilon_infinite_once_it_is_private_again() -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine)
    engine.set_budget(epsilon=50.0, delta=1e-5)
    train(module, optimizer, loader)
    engine.detach(module)
    train(module, optimizer, ordinary_batches())
    assert math.isfinite(engine.get_epsilon(1e-5))  # of what the ledger says: the mark says the rest
    other = PrivacyEngine()
    with pytest.warns(UserWarning, match=r"changed since it was detached \(0.bias, 0.weight"):
        private(module, other, optimizer)
    for ledger in (engine.ledger, other.ledger):
        assert ledger.epsilon(1e-5) == math.inf
        assert any("without privacy" in mark for mark in ledger.marks)


def test_public_data_in_between_are_declared_and_marked() -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine)
    train(module, optimizer, loader)
    spent = engine.get_epsilon(1e-5)
    engine.detach(module, public=True)
    train(module, optimizer, ordinary_batches())
    private(module, engine, optimizer)
    assert engine.get_epsilon(1e-5) == spent
    assert any("declared to ask no private data" in mark for mark in engine.ledger.marks)


def test_a_step_on_the_same_model_goes_on_with_its_ledger() -> None:
    module = net()
    step = explicit(module)
    step(ordinary_batches()[0])
    with pytest.raises(ProtocolError, match="made private before"):
        explicit(module, step.optimizer, ledger=step.ledger)
    step.detach()
    again = explicit(module, step.optimizer, ledger=step.ledger)
    again(ordinary_batches()[0])
    assert again.ledger is step.ledger
    assert step.ledger.steps == 2


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("door", ["auto", "hooks", "explicit"])
@pytest.mark.parametrize("way", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_made_private_anew_and_its_ledger_says_what_was_spent(way: Any, door: str) -> None:
    module = net()
    if door == "explicit":
        step = explicit(module)
        step(ordinary_batches()[0])
        ledger = step.ledger
    else:
        engine = PrivacyEngine()
        module, optimizer, loader = private(module, engine, grad_sample_mode=door)
        train(module, optimizer, loader)
        ledger = engine.ledger
    made = way(module)
    spent = ledger.epsilon(1e-5)
    if door != "explicit":
        train(module, optimizer, loader)  # after the copy: no part of what the copy has cost
        with pytest.raises(ProtocolError, match="give the copy to make_private"):
            made(ordinary_batches()[0][0])
    other = PrivacyEngine()
    made, others, its_loader = private(made, other)
    assert other.get_epsilon(1e-5) == pytest.approx(spent, rel=1e-12)
    train(made, others, its_loader)
    assert other.get_epsilon(1e-5) > spent
    other.detach(made)
    assert left_on(made, others) == []
    assert all(p is not q for p, q in zip(made.parameters(), module.parameters(), strict=True))


def test_on_the_same_engine_nothing_is_billed_twice() -> None:
    module, engine = net(), PrivacyEngine()
    module, optimizer, loader = private(module, engine)
    train(module, optimizer, loader)
    spent = engine.get_epsilon(1e-5)
    private(copy.deepcopy(module), engine)
    assert engine.get_epsilon(1e-5) == spent


def test_a_copy_whose_ledger_does_not_fit_stays_a_copy() -> None:
    module, engine = net(), PrivacyEngine(unit="user")
    private(module, engine)
    made = copy.deepcopy(module)
    with pytest.raises(LedgerError):
        private(made, PrivacyEngine())
    with pytest.raises(ProtocolError, match="copy of a private model"):
        made(ordinary_batches()[0][0])
