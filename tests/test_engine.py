"""The paper's door: what it refuses, what it leaves as it was, and what it lets through."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BudgetExceededError,
    ConfigurationError,
    CoverageError,
    Flat,
    PrivacyEngine,
    ProtocolError,
    UnsupportedModelError,
)
from privet.accounting.event import GaussianEvent
from tests.contracts.doors import assert_exact, loader, reference, size, taken

FOREIGN = "ignore:a step was taken on a batch"


def private(
    module: nn.Module, **options: Any
) -> tuple[PrivacyEngine, torch.optim.Optimizer, Any, list[dict[str, Tensor]]]:
    """Returns engine, optimizer, loader, and the gradients that each step will have seen."""
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "loss_reduction": "sum", "data_loader": loader()}
    returned = engine.make_private(module=module, optimizer=optimizer, **{**settings, **options})
    return engine, optimizer, returned[2], taken(module, optimizer)


def plain(net: nn.Module) -> nn.Module:
    """Returns an ordinary module with the same parameters."""
    twin = type(net)()
    twin.load_state_dict(net.state_dict())
    for p, q in zip(twin.parameters(), net.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return twin


def squares(output: Tensor) -> Tensor:
    return output.flatten(1).square().sum(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_the_same_objects_come_back_and_look_as_before() -> None:
    net = Net()
    keys, optimizer = list(net.state_dict()), torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    module, same, data_loader = PrivacyEngine(accountant="rdp").make_private(
        module=net, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert module is net
    assert same is optimizer
    assert type(module) is Net
    assert list(module.state_dict()) == keys
    for x, _ in data_loader:
        optimizer.zero_grad()
        F.mse_loss(module(F.pad(x, (0, 1))), torch.zeros(len(x), 2)).backward()
        optimizer.step()
    scheduler.step()
    assert list(module.state_dict()) == keys
    assert all(type(p) is nn.Parameter for p in net.parameters())


# -- order of calls ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(FOREIGN)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_second_backward_through_one_forward_is_refused(stepped: bool) -> None:
    net = Net()
    _, optimizer, _, seen = private(net)
    loss = squares(net(torch.randn(4, 3))).sum()
    loss.backward(retain_graph=True)
    if stepped:
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises((ProtocolError, RuntimeError)):
        loss.backward()
    if not stepped:
        optimizer.step()
    # Nothing of the refused backward is left for the next step.
    optimizer.zero_grad()
    batch = (torch.randn(4, 3),)
    expected = reference(plain(net), batch, lambda m, b: squares(m(b[0])), Flat(1.0))
    squares(net(batch[0])).sum().backward()
    optimizer.step()
    assert_exact(seen[-1], expected, tolerance=1e-5)


@pytest.mark.filterwarnings(FOREIGN)
def test_a_backward_through_an_old_forward_never_joins_a_new_one() -> None:
    net = Net()
    _, optimizer, _, _ = private(net)
    old = squares(net(torch.randn(4, 3))).sum()
    squares(net(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    net(torch.randn(4, 3))
    with pytest.raises((ProtocolError, RuntimeError)):
        old.backward()


def test_a_second_forward_and_backward_before_the_step_is_refused() -> None:
    net = Net()
    private(net)
    squares(net(torch.randn(4, 3))).sum().backward()
    with pytest.raises(ProtocolError, match="second backward"):
        squares(net(torch.randn(4, 3))).sum().backward()


def test_several_forwards_may_share_a_backward() -> None:
    net = Net()
    before = copy.deepcopy(net)
    _, optimizer, _, seen = private(net)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    (squares(net(x)) + squares(net(y))).sum().backward()
    with pytest.warns(UserWarning, match="did not come"):
        optimizer.step()
    expected = reference(before, (x, y), lambda m, b: squares(m(b[0])) + squares(m(b[1])), Flat(1.0))
    assert_exact(seen[-1], expected, tolerance=1e-5)


def test_forwards_of_different_sizes_never_share_a_backward() -> None:
    net = Net()
    private(net)
    net(torch.randn(4, 3))
    with pytest.raises(ProtocolError, match="forward of 5 examples follows one of 4"):
        net(torch.randn(5, 3))


def test_a_step_without_a_backward_is_refused() -> None:
    net = Net()
    engine, optimizer, _, _ = private(net, noise_multiplier=1.0)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ProtocolError, match="no backward since the last step"):
        optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert engine.ledger.steps == 0


@pytest.mark.filterwarnings(FOREIGN)
def test_a_step_twice_on_one_gradient_is_refused() -> None:
    net = Net()
    engine, optimizer, _, _ = private(net)
    squares(net(torch.randn(4, 3))).sum().backward()
    optimizer.step()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ProtocolError, match="no backward since the last step"):
        optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert engine.ledger.steps == 1


@pytest.mark.filterwarnings(FOREIGN)
def test_zero_grad_between_backward_and_step_is_refused_and_elsewhere_harmless() -> None:
    net = Net()
    _, optimizer, _, seen = private(net)
    optimizer.zero_grad()
    output = net(torch.randn(4, 3))
    optimizer.zero_grad()
    squares(output).sum().backward()
    with pytest.raises(ProtocolError, match="zero_grad"):
        optimizer.zero_grad()
    optimizer.step()
    assert size(seen[-1]) > 0
    optimizer.zero_grad(set_to_none=False)


def test_make_private_twice_is_refused() -> None:
    net = Net()
    _, optimizer, _, _ = private(net)
    with pytest.raises(ProtocolError, match="made private before"):
        private(net, optimizer=optimizer)
    with pytest.raises(ProtocolError, match="parts of the module"):
        private(nn.Sequential(net))


# -- no gradient but a private one reaches the optimizer ---------------------------------------------------------------


@pytest.mark.filterwarnings(FOREIGN)
def test_a_parameter_that_joins_the_optimizer_later_gets_no_raw_gradient() -> None:
    net, head = Net(), nn.Linear(2, 1)
    engine, optimizer, _, _ = private(net)
    optimizer.add_param_group({"params": head.parameters()})
    before = copy.deepcopy(head.state_dict())
    head(net(torch.randn(4, 3))).sum().backward()
    with pytest.raises(ProtocolError, match="nothing clipped"):
        optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in head.state_dict().items())
    assert engine.ledger.steps == 0

    def closure() -> Tensor:
        loss = head(net(torch.randn(4, 3))).sum()
        loss.backward()
        return loss

    optimizer.param_groups[1]["params"][0].grad = optimizer.param_groups[1]["params"][1].grad = None
    engine._watched[0].update.discard()
    with pytest.raises(ProtocolError, match="nothing clipped"):
        optimizer.step(closure)
    assert all(torch.equal(before[n], t) for n, t in head.state_dict().items())


@pytest.mark.filterwarnings(FOREIGN)
def test_a_parameter_replaced_after_make_private_is_refused() -> None:
    net = Net()
    private(net)
    net.second = nn.Linear(4, 2)
    with pytest.raises(ConfigurationError, match=r"second\.weight is trainable now"):
        net(torch.randn(4, 3))


@pytest.mark.filterwarnings(FOREIGN)
def test_a_parameter_frozen_between_steps_stays_and_learns_again_once_thawed() -> None:
    net = Net()
    _, optimizer, _, seen = private(net)
    for frozen in (False, True, False):
        net.first.requires_grad_(not frozen)
        optimizer.zero_grad()
        batch = (torch.randn(4, 3),)
        expected = reference(plain(net), batch, lambda m, b: squares(m(b[0])), Flat(1.0))
        squares(net(batch[0])).sum().backward()
        optimizer.step()
        assert set(seen[-1]) == {n for n, p in net.named_parameters() if p.requires_grad}
        assert_exact(seen[-1], expected, tolerance=1e-5)


def test_gradients_pass_through_a_module_that_is_held_fixed() -> None:
    net = Net()
    engine, optimizer, _, _ = private(net)
    net.requires_grad_(False)
    noise = torch.randn(4, 3, requires_grad=True)
    squares(net(noise)).sum().backward()
    assert noise.grad is not None
    assert float(noise.grad.norm()) > 0
    with pytest.raises(ProtocolError, match="without a private gradient"):
        optimizer.step()
    assert engine.ledger.steps == 0


@pytest.mark.filterwarnings(FOREIGN)
@pytest.mark.parametrize(
    "loss",
    [
        lambda net, x: squares(net(x)).sum() + 0.1 * net.first.weight.square().sum(),
        lambda net, x: squares(net.second(torch.tanh(net.first(x)))).sum(),
        lambda net, x: squares(net.eval()(x)).sum(),
        lambda net, x: squares(net.forward(x)).sum(),
    ],
    ids=["a penalty", "parts called alone", "eval mode", "forward called past the hooks"],
)
def test_a_gradient_by_another_way_trips(loss: Any) -> None:
    net = Net()
    engine, optimizer, _, _ = private(net)
    with pytest.raises(CoverageError, match="was not captured per example"):
        loss(net, torch.randn(4, 3)).backward()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ProtocolError):
        optimizer.step()
    assert engine.ledger.steps == 0


def test_a_gradient_of_a_gradient_is_refused() -> None:
    net = Net()
    private(net)
    x = torch.randn(4, 3, requires_grad=True)
    output = net(x)
    with pytest.raises(UnsupportedModelError, match="create_graph=True"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


# -- empty batches -----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    name: str


@dataclasses.dataclass
class Answer:
    logits: Tensor
    temperature: Tensor
    name: str


class Shaped(nn.Module):
    """Returns its logits in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits, temperature = self.linear(x), torch.tensor(2.0)
        return {
            "tensor": logits,
            "tuple": (logits, temperature, "name"),
            "dict": {"logits": logits, "temperature": temperature},
            "namedtuple": Pair(logits, "name"),
            "dataclass": Answer(logits, temperature, "name"),
        }[self.kind]


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.filterwarnings(FOREIGN)
@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "namedtuple", "dataclass"])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_keeps_its_structure_and_adds_nothing(kind: str, first: bool) -> None:
    net = Shaped(kind)
    engine, optimizer, _, seen = private(net)
    if not first:
        squares(logits_of(net(torch.randn(4, 3)))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    output = net(torch.zeros(0, 3))
    assert type(output) is type(Shaped(kind)(torch.zeros(1, 3)))
    assert logits_of(output).shape == (0, 2)
    squares(logits_of(output) - 1.0).sum().backward()
    optimizer.step()
    assert size(seen[-1]) == 0.0
    assert engine.ledger.steps == (1 if first else 2)


def test_an_empty_batch_gets_noise_and_is_billed() -> None:
    net = Net()
    engine, optimizer, _, seen = private(net, noise_multiplier=1.0)
    net(torch.zeros(0, 3)).sum().backward()
    with pytest.warns(UserWarning, match="did not come"):
        optimizer.step()
    assert size(seen[-1]) > 0
    assert engine.ledger.steps == 1


class Leaky(nn.Module):
    """Keeps what it computed, where a loss can find it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.auxiliary = output - 1.0
        return output


@pytest.mark.filterwarnings(FOREIGN)
def test_the_example_that_stands_in_for_an_empty_batch_never_reaches_the_sum() -> None:
    net = Leaky()
    _, optimizer, _, seen = private(net)
    (net(torch.zeros(0, 3)).sum() + net.auxiliary.square().sum()).backward()
    optimizer.step()
    assert size(seen[-1]) == 0.0


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_target_is_kept_to_the_last_step_and_not_beyond() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    _, _, data_loader = engine.make_private_with_epsilon(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(torch.randn(20, 3), torch.randn(20, 2)), batch_size=4),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    for epoch in range(3):
        for steps, (x, y) in enumerate(data_loader):
            optimizer.zero_grad()
            F.mse_loss(net(x), y, reduction="mean").backward()
            before = copy.deepcopy(net.state_dict())
            if (epoch, steps) == (2, 0):
                with pytest.raises(BudgetExceededError):
                    optimizer.step()
                assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
                assert all(p.grad is None for p in net.parameters())
                break
            optimizer.step()
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0
    assert engine.ledger.steps == 10


# -- bad input leaves everything as it was -----------------------------------------------------------------------------


def hooks_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    found += [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()]
    return [*found, len(optimizer._optimizer_step_pre_hooks), int("zero_grad" in vars(optimizer))]


def _weighted() -> DataLoader[Any]:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 16, 16)
    return loader(sampler=sampler)


class _Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(3))


class _NoLength(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(2)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative noise": ({"noise_multiplier": -1.0}, ConfigurationError, "noise_multiplier"),
    "nan noise": ({"noise_multiplier": float("nan")}, ConfigurationError, "noise_multiplier"),
    "zero clip norm": ({"max_grad_norm": 0.0}, ConfigurationError, "clip_norm"),
    "negative clip norm": ({"max_grad_norm": -1.0}, ConfigurationError, "clip_norm"),
    "infinite clip norm": ({"max_grad_norm": float("inf")}, ConfigurationError, "clip_norm"),
    "unknown clipping": ({"clipping": "flatt"}, ConfigurationError, "'flat', 'per_layer'"),
    "two clip norms": ({"clipping": Flat(2.0)}, ConfigurationError, "one home"),
    "unknown mode": ({"grad_sample_mode": "ew"}, ConfigurationError, "grad_sample_mode"),
    "unknown reduction": ({"loss_reduction": "none"}, ConfigurationError, "loss_reduction"),
    "misspelt option": ({"max_grad_nrom": 1.0}, TypeError, "max_grad_nrom"),
    "weighted sampler": ({"data_loader": _weighted()}, ConfigurationError, "WeightedRandomSampler"),
    "stream": ({"data_loader": DataLoader(_Stream())}, ConfigurationError, "IterableDataset"),
    "no length": ({"data_loader": [1, 2]}, ConfigurationError, "DataLoader"),
    "batch above dataset": ({"data_loader": loader(4, 8)}, ConfigurationError, "rate"),
    "zero dataset_size": ({"dataset_size": 0}, ConfigurationError, "dataset_size"),
    "criterion that trains": ({"criterion": nn.Linear(2, 2)}, ConfigurationError, "criterion"),
    "criterion that is none": ({"criterion": 3}, ConfigurationError, "criterion"),
    "layers that are not there": (
        {"clipping": "per_layer", "max_grad_norm": {"third": 1.0}},
        ConfigurationError,
        "third",
    ),
    "generator that is none": ({"noise_generator": 7}, ConfigurationError, "noise_generator"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named_and_changes_nothing(case: str) -> None:
    options, kind, words = BAD[case]
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    before, ledger = hooks_of(net, optimizer), engine.ledger.state_dict()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "data_loader": loader(), **options}
    with pytest.raises(kind, match=words):
        engine.make_private(module=net, optimizer=optimizer, **settings)
    assert hooks_of(net, optimizer) == before
    assert engine.ledger.state_dict() == ledger
    assert engine.mechanisms == ()
    assert all(type(p) is nn.Parameter for p in net.parameters())
    # and the same objects are still good for a correct call
    engine.make_private(module=net, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0)


def _parts(net: nn.Module) -> dict[str, tuple[Any, Any, str]]:
    other = nn.Linear(2, 2)
    frozen = copy.deepcopy(net).requires_grad_(False)
    sgd = torch.optim.SGD
    return {
        "foreign parameters": (net, sgd([*net.parameters(), *other.parameters()], lr=0.1), "not the module's"),
        "parameters left out": (net, sgd(net.first.parameters(), lr=0.1), r"second\.weight, second\.bias"),
        "nothing trainable": (frozen, sgd(frozen.parameters(), lr=0.1), "no trainable parameter"),
        "no module": (list(net.parameters()), sgd(net.parameters(), lr=0.1), "torch.nn.Module"),
        "no optimizer": (net, "sgd", "torch.optim.Optimizer"),
        "LBFGS": (net, torch.optim.LBFGS(net.parameters()), "LBFGS"),
        "SparseAdam": (net, torch.optim.SparseAdam(net.parameters()), "SparseAdam"),
    }


@pytest.mark.parametrize("case", _parts(Net()))
def test_parts_that_do_not_fit_are_named_and_left_alone(case: str) -> None:
    net = Net()
    module, optimizer, words = _parts(net)[case]
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(ConfigurationError, match=words):
        engine.make_private(
            module=module, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
        )
    private(net)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_a_target_that_no_noise_reaches_is_refused(epsilon: float) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = hooks_of(net, optimizer)
    with pytest.raises(ConfigurationError, match="epsilon"):
        PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=net,
            optimizer=optimizer,
            data_loader=loader(),
            target_epsilon=epsilon,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
        )
    assert hooks_of(net, optimizer) == before


def test_a_loss_of_the_models_own_is_refused() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Any:
            output = super().forward(x)
            return squares(output).mean(), output

    net = Own()
    engine, _, _, _ = private(net)
    with pytest.raises(UnsupportedModelError, match="scalar that needs a gradient"):
        net(torch.randn(4, 3))
    assert engine.ledger.steps == 0
    assert all(type(p) is nn.Parameter for p in net.parameters())


def test_an_output_whose_first_axis_is_not_the_batch_is_refused() -> None:
    class Turned(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).t()

    net = Turned()
    private(net)
    with pytest.raises(UnsupportedModelError, match="batch on axis 0"):
        net(torch.randn(4, 3))
    assert all(type(p) is nn.Parameter for p in net.parameters())


def test_a_forward_that_fails_leaves_nothing_watched() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 5:
                raise ValueError("not five")
            return super().forward(x)

    net = Fails()
    _, optimizer, _, seen = private(net)
    squares(net(torch.randn(7, 3))).sum().backward()
    with pytest.warns(UserWarning, match="did not come"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="not five"):
        net(torch.randn(5, 3))
    assert all(type(p) is nn.Parameter for p in net.parameters())
    squares(net(torch.randn(3, 3))).sum().backward()
    optimizer.step()
    assert size(seen[-1]) > 0


# -- two networks ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(FOREIGN)
def test_a_gan_takes_one_make_private_each() -> None:
    generator, discriminator = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    engine = PrivacyEngine(accountant="rdp")
    data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    optimizers, loaders = {}, {}
    for name, net in (("g", generator), ("d", discriminator)):
        optimizers[name] = torch.optim.Adam(net.parameters(), lr=0.01)
        _, _, loaders[name] = engine.make_private(
            module=net, optimizer=optimizers[name], data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
        )
    for (real,) in itertools.islice(loaders["d"], 3):
        optimizers["d"].zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(len(real), 2))
        (F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()).backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        discriminator.requires_grad_(False)
        F.softplus(-discriminator(generator(torch.randn(4, 2)))).mean().backward()
        optimizers["g"].step()
        discriminator.requires_grad_(True)
    assert {type(p.event) for p in engine.ledger.phases} >= {GaussianEvent}
    assert len(engine.mechanisms) == 2
