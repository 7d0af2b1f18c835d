"""Several optimizers as one: each moves its own part by the one private gradient, at both doors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import BatchMemoryManager, ChainedOptimizer, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.errors import ConfigurationError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def parts(module: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in module.parameters() if p.dim() == 2]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    return [torch.optim.SGD(matrices, lr=0.5, momentum=0.9), torch.optim.AdamW(vectors, lr=0.1)]


def data() -> TensorDataset:
    return TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))


def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, batches: list, key: int = 7) -> nn.Module:
    step = PrivateStep(
        module,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0)),
        loss_per_example=loss,
        expected_batch_size=8,
        noise_generator=torch.Generator().manual_seed(key),
    )
    for batch in batches:
        step(batch)
    return module


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
def test_each_part_moves_as_its_own_optimizer_moves_it():
    """SGD and AdamW treat every parameter apart, so each part has to end where one optimizer for all would take it."""
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(4)]
    both = net()
    trained(both, ChainedOptimizer(*parts(both)), batches)
    # The same training again, to take note of its gradients, which are then replayed by hand.
    again, seen = net(), []
    chained = ChainedOptimizer(*parts(again))
    chained.register_step_post_hook(lambda *rest: seen.append([p.grad.clone() for p in again.parameters()]))
    trained(again, chained, batches)
    by_hand = net()
    sgd, adam = parts(by_hand)
    for gradients in seen:
        for p, gradient in zip(by_hand.parameters(), gradients, strict=True):
            p.grad = gradient
        sgd.step()
        adam.step()
    for a, b, c in zip(both.parameters(), again.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    for moved, start in zip(both.parameters(), net().parameters(), strict=True):
        assert float((moved - start).detach().abs().max()) > 0.01


def test_the_papers_door_bills_one_step_for_all_parts():
    module, engine = net(), PrivacyEngine()
    optimizer = ChainedOptimizer(*parts(module))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    _, optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(data(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = copy.deepcopy(module.state_dict())
    for x, y in loader:
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step()
    assert engine.ledger.steps == len(loader)
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [group["lr"] for part in optimizer.optimizers for group in part.param_groups] == [0.25, 0.05]


def test_a_state_goes_on_where_it_was_saved():
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(3)]
    plain = net()
    chained = ChainedOptimizer(*parts(plain))

    def moved(module: nn.Module, optimizer: torch.optim.Optimizer, some: list) -> None:
        for batch in some:
            optimizer.zero_grad()
            loss(module, batch).mean().backward()
            optimizer.step()

    moved(plain, chained, batches[:2])
    other = net()
    restored = ChainedOptimizer(*parts(other))
    other.load_state_dict(plain.state_dict())
    restored.load_state_dict(copy.deepcopy(chained.state_dict()))
    assert len(restored.state) == len(chained.state) == 4
    moved(plain, chained, batches[2:])
    moved(other, restored, batches[2:])
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    restored.param_groups[1]["lr"] = 3.0
    assert restored.optimizers[1].param_groups[0]["lr"] == 3.0


def test_a_closure_is_run_once_for_all_parts():
    module = net()
    chained, calls = ChainedOptimizer(*parts(module)), []

    def closure() -> torch.Tensor:
        calls.append(1)
        chained.zero_grad()
        value = loss(module, (torch.ones(2, 5), torch.zeros(2, dtype=torch.long))).mean()
        value.backward()
        return value

    assert float(chained.step(closure).detach()) > 0.0
    assert len(calls) == 1


def test_what_is_no_chain_is_refused():
    module = net()
    sgd, adam = parts(module)
    with pytest.raises(ConfigurationError, match="at least one"):
        ChainedOptimizer()
    with pytest.raises(ConfigurationError, match="moved twice"):
        ChainedOptimizer(sgd, adam, torch.optim.SGD(module[0].parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="got Linear"):
        ChainedOptimizer(module[0])
    with pytest.raises(ConfigurationError, match=r"optimizers\[i\]\.add_param_group"):
        ChainedOptimizer(sgd, adam).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_part_does_not_step_on_a_gradient_of_its_own():
    module, engine = net(), PrivacyEngine()
    optimizer = ChainedOptimizer(*parts(module))
    engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(data(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="hooks",
    )
    F.cross_entropy(module(torch.randn(8, 5)), torch.randint(3, (8,))).backward()
    with pytest.raises(Exception, match="optimizer"):
        optimizer.optimizers[0].step()


def made_private(module: nn.Module, optimizer: torch.optim.Optimizer, engine: PrivacyEngine, **options):
    return engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(data(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )


def test_each_part_has_a_scheduler_which_counts_logical_steps():
    module, engine = net(), PrivacyEngine()
    optimizer = ChainedOptimizer(*parts(module))
    _, optimizer, loader = made_private(module, optimizer, engine)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(each, 1, gamma)
        for each, gamma in zip(optimizer.optimizers, (0.5, 0.1), strict=True)
    ]
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as physical:
        parts_seen = 0
        for x, y in physical:
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
            parts_seen += 1
    steps = len(loader)
    assert parts_seen > steps == engine.ledger.steps
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == pytest.approx([0.5 * 0.5**steps, 0.1 * 0.1**steps])


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
@pytest.mark.parametrize("door", ["paper", "explicit"])
def test_a_group_that_is_added_to_a_part_trains_with_privacy(door: str):
    module, engine = net(), PrivacyEngine()
    module[0].requires_grad_(False)
    sgd = torch.optim.SGD([module[2].weight], lr=0.5)
    adam = torch.optim.AdamW([module[2].bias], lr=0.1)
    optimizer = ChainedOptimizer(sgd, adam)
    if door == "paper":
        made_private(module, optimizer, engine)
    else:
        step = PrivateStep(
            module,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0)),
            loss_per_example=loss,
            expected_batch_size=8,
            ledger=engine.ledger,
        )
    module[0].requires_grad_(True)
    adam.add_param_group({"params": module[0].parameters(), "lr": 0.2})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 2]
    before = copy.deepcopy(module.state_dict())
    batch = (torch.randn(8, 5), torch.randint(3, (8,)))
    if door == "paper":
        loss(module, batch).mean().backward()
        optimizer.step()
    else:
        step(batch)
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    saved = copy.deepcopy(optimizer.state_dict())
    assert len(saved["param_groups"]) == 3
    other, again = net(), PrivacyEngine()
    restored = ChainedOptimizer(
        torch.optim.SGD([other[2].weight], lr=0.5),
        torch.optim.AdamW([{"params": [other[2].bias]}, {"params": other[0].parameters()}], lr=0.1),
    )
    made_private(other, restored, again)
    restored.load_state_dict(saved)
    assert again.ledger.steps == 1  # the ledger rides in the state of the whole
    assert [group["lr"] for group in restored.param_groups] == [0.5, 0.1, 0.2]


def test_what_several_optimizers_lack_is_named_and_a_list_is_told_the_way_on():
    module = net()
    sgd, _ = parts(module)
    with pytest.raises(ConfigurationError, match=r"lacks trainable parameters of the module: 0\.bias, 2\.bias"):
        made_private(module, ChainedOptimizer(sgd), PrivacyEngine())
    with pytest.raises(ConfigurationError, match=r"a list of 2.*ChainedOptimizer\(first, second\)"):
        made_private(module, parts(module), PrivacyEngine())


def test_a_copy_of_a_chain_has_copies_of_its_parts():
    module = net()
    chained = ChainedOptimizer(*parts(module))
    other, copied = copy.deepcopy((module, chained))
    assert {id(p) for group in copied.param_groups for p in group["params"]} == {id(p) for p in other.parameters()}
    made_private(other, copied, PrivacyEngine())
