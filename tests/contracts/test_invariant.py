"""Laws 4, 8 and 9: order, checkpoints, precision, copies, forks and optimizers change nothing that they should not."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep, ProtocolError
from tests.contracts.doors import (
    DOORS,
    Expected,
    assert_exact,
    distance,
    door_sum,
    explicit_sum,
    loader,
    paper_sum,
    reference,
    size,
    taken,
)
from tests.contracts.zoo import ZOO, Checkpointed, D, T, batch_of, model_of, plain, squares
from tests.noise.law import refutations

# -- law 4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ZOO)
def test_the_order_of_the_rows_changes_nothing(name: str, door: str) -> None:
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = tuple(t[order] for t in batch)
    expected = reference(plain(model), batch, loss, Flat(1.0))
    assert_exact(
        door_sum(door, model, turned, loss=loss),
        Expected(door_sum(door, model, batch, loss=loss), terms=expected.terms),
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("door", DOORS)
def test_checkpointed_activations_change_nothing(door: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant).double()

    class Plain(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.block(self.block(torch.tanh(self.first(x)))))

    stored = Plain(reentrant=True).double()
    stored.load_state_dict(model.state_dict())
    batch, loss = batch_of("linear", 5), lambda m, b: squares(m(*b))
    expected = door_sum(door, stored, batch, batch, loss=loss)
    terms = reference(stored, batch, loss, Flat(1.0)).terms
    assert_exact(door_sum(door, model, batch, batch, loss=loss), Expected(expected, terms=terms))


class Whole(nn.Module):
    """Checkpoints everything, dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def test_recomputed_dropout_is_the_same_dropout() -> None:
    torch.manual_seed(0)
    model, batch = Whole().double(), batch_of("linear", 5)
    sums = []
    for twin in (model, model.block):

        def loss(m: nn.Module, b: Any) -> Tensor:
            torch.manual_seed(7)
            return squares(m(*b))

        sums.append(list(paper_sum(twin, batch, batch, loss=loss, policy=Flat(1.0)).values()))
    assert distance(dict(enumerate(sums[0])), dict(enumerate(sums[1]))) <= 1e-12


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["linear", "convolution", "embedding tied to the output", "attention", "merged axes"])
def test_autocast_is_near(name: str, door: str) -> None:
    model, batch, loss = model_of(name, torch.float32), batch_of(name, 5, dtype=torch.float32), ZOO[name].loss

    def half(m: nn.Module, b: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(m, b).float()

    exact = door_sum(door, model, batch, loss=loss)
    found = door_sum(door, model, batch, loss=half)
    terms = reference(model, batch, loss, Flat(1.0)).terms
    assert 0.0 < distance(found, exact) <= 0.05 * terms
    assert {t.dtype for t in found.values()} == {torch.float32}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["linear", "convolution", "attention"])
def test_norms_are_not_rounded_by_a_backward_inside_autocast(name: str, door: str) -> None:
    """One example of a large gradient has a clipped sum as long as the clip norm, to float32's precision."""
    model, batch = model_of(name, torch.float32), batch_of(name, 1, dtype=torch.float32)

    def large(m: nn.Module, b: Any) -> Tensor:
        return ZOO[name].loss(m, b).float() * 1e4

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = door_sum(door, model, batch, loss=large)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert size(found) == pytest.approx(1.0, rel=2e-4)
    assert size(found) <= 1.0 + 1e-6


def test_the_two_doors_agree() -> None:
    model, batch, loss = model_of("in place"), batch_of("in place", 6), ZOO["in place"].loss
    terms = reference(plain(model), batch, loss, Flat(1.0)).terms
    found, expected = (door(model, batch, loss=loss, policy=Flat(1.0)) for door in (explicit_sum, paper_sum))
    assert_exact(found, Expected(expected, terms=terms))


# -- law 8 -------------------------------------------------------------------------------------------------------------


class Run:
    """A private run of a linear layer with many weights, so that one step's noise is a sample worth testing."""

    def __init__(self, door: str, *, noise: float = 1.3, clip: float = 0.7, mean: bool = True, **options: Any) -> None:
        self.net = nn.Linear(60, 100, bias=False)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0)
        dataset = TensorDataset(torch.zeros(16, 60))
        if door == "paper":
            self.engine = PrivacyEngine(accountant="rdp")
            *_, self.loader = self.engine.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(dataset, batch_size=4),
                noise_multiplier=noise,
                max_grad_norm=clip,
                loss_reduction="mean" if mean else "sum",
                **options,
            )
            self.update = self.engine._watched[0].update
        else:
            self.step = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(clip), noise=Gaussian(noise), steps=4),
                loss_per_example=lambda m, b: m(b[0]).sum(1),
                expected_batch_size=4,
                **options,
            )
            self.loader = self.step.batches(dataset)
            self.update = self.step._update
        self.door, self.mean = door, mean
        self.seen = taken(self.net, self.optimizer)

    def train(self, steps: int = 1) -> list[Tensor]:
        for batch in itertools.islice(self.loader, steps):
            if self.door == "paper":
                self.optimizer.zero_grad()
                losses = self.net(batch[0]).sum(1)
                (losses.mean() if self.mean else losses.sum()).backward()
                self.optimizer.step()
            else:
                self.step(batch)
        return [g["weight"].flatten() for g in self.seen]


@pytest.mark.parametrize("door", DOORS)
def test_the_noise_has_the_right_standard_deviation(door: str) -> None:
    run = Run(door)
    std = 1.3 * 0.7 / 4
    noise = torch.cat(run.train(3)).double()  # the data are zero: what arrives is noise alone
    assert abs(float(noise.std()) / std - 1.0) < 0.05
    assert not refutations(noise.numpy(), std)
    for wrong in (2 / 3, 3 / 2):
        assert refutations(noise.numpy(), std * wrong)


def test_a_summed_loss_has_noise_that_is_not_divided() -> None:
    noise = torch.cat(Run("paper", mean=False).train(3)).double()
    assert not refutations(noise.numpy(), 1.3 * 0.7)
    assert refutations(noise.numpy(), 1.3 * 0.7 / 4)


@pytest.mark.parametrize("door", DOORS)
def test_a_global_seed_repeats_neither_noise_nor_batches(door: str) -> None:
    found, batches = [], []
    for _ in range(2):
        torch.manual_seed(0)
        run = Run(door)
        torch.manual_seed(0)
        found.append(run.train(2))
        sampler = run.loader._batches
        batches.append([sampler.examples(9, i) for i in range(8)])
    assert not torch.equal(found[0][0], found[1][0])
    assert abs(float(torch.corrcoef(torch.stack([found[0][0], found[1][0]]))[0, 1])) < 0.1
    assert batches[0] != batches[1]


def test_private_training_leaves_the_global_generator_alone() -> None:
    run = Run("paper")
    run.train(1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batch = torch.zeros(4, 60)
    run.net(batch).mean().backward()
    with pytest.warns(UserWarning, match="did not come"):
        run.optimizer.step()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("door", DOORS)
def test_no_two_steps_share_noise(door: str) -> None:
    first, second, third = Run(door).train(3)
    for a, b in itertools.combinations((first, second, third), 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


@pytest.mark.parametrize("door", DOORS)
def test_a_reproducible_run_repeats_bit_for_bit_and_says_so(door: str) -> None:
    runs = [Run(door, noise_generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    first, second = (run.train(3) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = Run(door, noise_generator=torch.Generator().manual_seed(4)).train(1)
    assert not torch.equal(first[0], other[0])
    assert runs[0].update.ledger.marks == ("reproducible key",)


def test_a_reproducible_run_is_refused_in_secure_mode() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="secure_mode"):
        PrivacyEngine(accountant="rdp", secure_mode=True).make_private(
            module=net,
            optimizer=optimizer,
            data_loader=loader(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator(),
        )
    assert not net._forward_hooks


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_private_model_predicts_and_does_not_train(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    run = Run("paper")
    run.train(1)
    for net in (run.net, copy.deepcopy(run.net)):
        twin = duplicate(net)
        with pytest.raises(ProtocolError, match="copy of a private model"):
            twin(torch.zeros(2, 60))
        assert twin.eval()(torch.zeros(2, 60)).shape == (2, 100)
        with torch.no_grad():
            assert twin.train()(torch.zeros(2, 60)).shape == (2, 100)
    run.train(1)


def test_a_copy_between_forward_and_backward_is_an_ordinary_copy() -> None:
    run = Run("paper")
    output = run.net(torch.zeros(4, 60))
    twin = copy.deepcopy(run.net)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    assert {type(t) for t in run.net.state_dict().values()} == {Tensor}
    output.mean().backward()


def test_a_copied_update_draws_other_noise() -> None:
    """Model and optimizer copied together, hooks and all, as some schedulers and tuners do."""
    run = Run("paper")
    twin = copy.deepcopy(run.update.noise)
    assert twin.source is not run.update.noise.source
    seen = []
    from privet.gradients.clipped_sum import ClippedSum

    for noise in (run.update.noise, twin):
        total = ClippedSum({"weight": torch.zeros(6000)}, 1.0)
        seen.append(noise.release(total, multiplier=1.0, step=5).values["weight"])
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < 0.1


def test_a_copied_optimizer_is_no_way_around_the_noise() -> None:
    run = Run("paper")
    net, optimizer = copy.deepcopy((run.net, run.optimizer))
    with pytest.raises(ProtocolError, match="copy of a private model"):
        net(torch.zeros(2, 60))
    assert optimizer.param_groups[0]["params"][0] is net.weight


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_run_draws_other_noise() -> None:
    run = Run("paper")
    run.train(1)
    batches = iter(run.loader)
    batch = next(batches)
    reader, writer = os.pipe()
    child = os.fork()
    run.optimizer.zero_grad()
    run.net(batch[0]).mean().backward()
    run.optimizer.step()
    noise = run.seen[-1]["weight"].flatten()
    if child == 0:  # no pytest in here
        os.write(writer, noise[:500].numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(reader, 2000)), dtype=torch.float32)
    os.close(reader), os.close(writer)
    assert len(theirs) == 500
    assert abs(float(torch.corrcoef(torch.stack([noise[:500], theirs]))[0, 1])) < 0.25


# -- law 9 -------------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def by_hand(
    make: Callable[[Any], torch.optim.Optimizer], start: nn.Module, gradients: list[dict[str, Tensor]]
) -> nn.Module:
    """Returns what an ordinary optimizer makes of the gradients."""
    net = copy.deepcopy(start)
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in gradients:
        for n, p in net.named_parameters():
            p.grad = step[n]
        optimizer.step()
        scheduler.step()
    return net


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_works_with_schedulers_and_closures(name: str, closure: bool) -> None:
    make = OPTIMIZERS[name]
    net = nn.Linear(2, 3)
    start = copy.deepcopy(net)
    optimizer = make(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    engine = PrivacyEngine(accountant="rdp")
    data = DataLoader(TensorDataset(torch.randn(16, 2), torch.randn(16, 3)), batch_size=4)
    _, _, private = engine.make_private(
        module=net, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    seen = taken(net, optimizer)
    losses = []
    for x, y in private:

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), y)  # noqa: B023
            loss.backward()
            return loss

        if closure:
            losses.append(optimizer.step(evaluate))
        else:
            losses.append(evaluate())
            optimizer.step()
        scheduler.step()
    assert len(seen) == 4
    assert engine.ledger.steps == 4
    assert all(loss is not None for loss in losses)
    expected = by_hand(make, start, seen)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(net.parameters(), expected.parameters(), strict=True))
    assert scheduler.get_last_lr()[0] == pytest.approx(optimizer.defaults["lr"] * 0.5**4)


def test_an_optimizer_that_calls_its_closure_twice_is_stopped() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
                return closure()

    net = nn.Linear(2, 1)
    optimizer = Twice(net.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    _, _, private = engine.make_private(
        module=net, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).mean()
        loss.backward()
        return loss

    x, _ = next(iter(private))
    with pytest.raises(ProtocolError, match="closure twice"):
        optimizer.step(closure)
    assert engine.ledger.steps == 1


@pytest.mark.parametrize("closure", [False, True])
def test_an_optimizer_that_refines_another_takes_one_step_a_gradient(closure: bool) -> None:
    class Refined(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch puts hooks on a class at its first instance
    net = nn.Linear(2, 1)
    optimizer = Refined(net.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    _, _, private = engine.make_private(
        module=net, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )
    for x, _ in private:

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = net(x).mean()  # noqa: B023
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        with pytest.raises(ProtocolError):
            optimizer.step()
    assert engine.ledger.steps == 4


def test_positions_are_told_from_examples_whatever_the_sizes_of_the_batches() -> None:
    """Private epochs over sequences of T, until a batch is of T examples by chance."""
    model = model_of("positions by arange")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(*batch_of("positions by arange", 24)), batch_size=T)
    engine = PrivacyEngine(accountant="rdp")
    _, _, private = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    sizes: list[int] = []
    for _ in range(60):  # a pass has none of that size with probability 0.4
        for (x,) in private:
            optimizer.zero_grad()
            squares(model(x)).mean().backward()
            optimizer.step()
            sizes.append(len(x))
        if T in sizes[1:]:
            break
    assert T in sizes[1:]
    assert engine.ledger.steps == len(sizes), "none was refused"
