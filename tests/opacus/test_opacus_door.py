"""Scripts as they are written for Opacus, held against the same training at the core's door."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import privet
from privet.opacus import OpacusPrivacyWarning, PrivacyEngine
from privet.opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from privet.opacus.utils.batch_memory_manager import BatchMemoryManager

SIGMA, C, N, BATCH = 0.8, 0.5, 32, 8


def data():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(N, 1, 6, 6, generator=generator)
    return torch.utils.data.TensorDataset(inputs, torch.randint(0, 3, (N,), generator=generator))


def loader(**options):
    return torch.utils.data.DataLoader(data(), batch_size=BATCH, **options)


def model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def generator():
    return torch.Generator().manual_seed(11)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def private(engine=None, **options):
    """Returns the engine, and what its make_private returns for a training in the loader's order."""
    engine, net = engine or PrivacyEngine(), model()
    options = {"poisson_sampling": False, "noise_generator": generator(), "max_grad_norm": C, **options}
    with pytest.warns(OpacusPrivacyWarning, match="poisson_sampling=False"):
        return engine, *engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
            data_loader=options.pop("data_loader", None) or loader(),
            noise_multiplier=SIGMA,
            **options,
        )


def train(net, optimizer, batches, criterion=F.cross_entropy):
    for inputs, targets in batches:
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        optimizer.step()


def trained_at_the_core(epochs=1):
    engine, net = privet.PrivacyEngine(), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        poisson_sampling=False,
        noise_generator=generator(),
    )
    for _ in range(epochs):
        train(net, optimizer, batches)
    return engine, net


@pytest.fixture
def _reproducible():
    """Lets the noise come from a generator, of which the package warns."""
    with pytest.warns(OpacusPrivacyWarning, match="noise come from a torch.Generator"):
        yield


@pytest.mark.usefixtures("_reproducible")
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_a_script_takes_the_very_steps_of_the_core_with_the_same_noise(mode):
    engine, net, optimizer, batches = private(grad_sample_mode=mode)
    for _ in range(2):
        train(net, optimizer, batches)
    core, theirs = trained_at_the_core(epochs=2)
    torch.testing.assert_close(weights(net), weights(theirs), rtol=1e-4, atol=1e-5)
    assert engine.accountant.history == [(SIGMA, 1.0, 2)]
    assert engine.get_epsilon(delta=1e-5) == pytest.approx(core.get_epsilon(delta=1e-5), rel=1e-3)


@pytest.mark.usefixtures("_reproducible")
def test_ghost_clipping_returns_the_criterion_third_and_takes_the_same_steps():
    engine, net, optimizer, criterion, batches = private(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    train(net, optimizer, batches, criterion)
    assert all(not hasattr(p, "grad_sample") or p.grad_sample is None for p in net.parameters())
    torch.testing.assert_close(weights(net), weights(trained_at_the_core()[1]), rtol=1e-4, atol=1e-5)
    assert engine.accountant.history == [(SIGMA, 1.0, 1)]


@pytest.mark.usefixtures("_reproducible")
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_physical_batches_take_the_same_steps_and_cost_the_same(mode):
    engine, net, optimizer, *criterion, batches = private(grad_sample_mode=mode)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as parts:
        assert max(len(targets) for _, targets in train_listed(net, optimizer, parts, *criterion)) == 3
    torch.testing.assert_close(weights(net), weights(trained_at_the_core()[1]), rtol=1e-4, atol=1e-5)
    assert engine.accountant.history == [(SIGMA, 1.0, 1)]


def train_listed(net, optimizer, batches, criterion=F.cross_entropy):
    met = []
    train(net, optimizer, (met.append(batch) or batch for batch in batches), criterion)
    return met


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_poisson_steps_are_counted_one_by_one_and_cost_what_the_core_says(accountant):
    engine, net = PrivacyEngine(accountant=accountant), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(shuffle=True),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
    )
    train(net, optimizer, batches)
    assert engine.accountant.history == [(SIGMA, BATCH / N, N // BATCH)]
    mechanism = privet.Mechanism(privet.Poisson(BATCH / N), privet.Flat(C), privet.Gaussian(SIGMA), steps=N // BATCH)
    core = mechanism.epsilon(1e-5, accountant="pld" if accountant == "prv" else accountant)
    assert engine.get_epsilon(1e-5) == pytest.approx(core, rel=2e-2)
    assert engine.get_epsilon(1e-5) >= mechanism.epsilon(1e-5) * (1.0 - 1e-6)


def test_the_target_of_make_private_with_epsilon_is_met_and_not_exceeded():
    engine, net = PrivacyEngine(), model()
    _, optimizer, batches = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=C,
    )
    engine.accountant.history = [(optimizer.noise_multiplier, BATCH / N, 2 * len(batches))]
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0


def test_a_hook_of_the_user_does_not_stop_the_counting():
    engine, net = PrivacyEngine(), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
    )
    seen = []
    with pytest.warns(OpacusPrivacyWarning, match="bills its steps itself"):
        optimizer.attach_step_hook(lambda o: seen.append(o.accumulated_iterations))
    train(net, optimizer, batches)
    assert seen == [1] * len(batches)
    assert len(engine.accountant) == len(batches)


def test_batches_that_are_added_up_by_hand_are_counted_as_what_they_are():
    engine, net = PrivacyEngine(), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
    )
    drawn = iter(batches)
    optimizer.signal_skip_step()
    train(net, optimizer, [next(drawn)])
    assert engine.accountant.history == []
    with (
        pytest.warns(OpacusPrivacyWarning, match="2 batches were added up"),
        pytest.warns(UserWarning, match="did not come, whole and fresh"),
        pytest.warns(OpacusPrivacyWarning, match="batches left out"),
        pytest.warns(UserWarning, match="were left out, and a later one"),
    ):
        train(net, optimizer, [next(drawn)])
    assert (SIGMA / 2, 1.0, 1) in engine.accountant.history


def test_no_other_optimizer_steps_on_a_gradient_that_is_not_private():
    _, net = PrivacyEngine(), model()
    net, optimizer, batches = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
    )
    inputs, targets = next(iter(batches))
    F.cross_entropy(net(inputs), targets).backward()
    with pytest.raises(privet.ProtocolError, match="would step on a gradient"):
        optimizer.original_optimizer.step()


def test_a_parameter_that_is_moved_by_hand_between_backward_and_step_costs_everything():
    engine, net = PrivacyEngine(), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
    )
    inputs, targets = next(iter(batches))
    F.cross_entropy(net(inputs), targets).backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(0.1 * p.grad)
    with (
        pytest.warns(OpacusPrivacyWarning, match="a parameter changed"),
        pytest.raises(privet.ProtocolError, match="private parameter changed"),
    ):
        optimizer.step()
    assert engine.get_epsilon(1e-5) == float("inf")


def test_a_sum_that_was_declared_a_mean_does_not_let_one_example_rescale_the_others():
    net = nn.Linear(3, 1, bias=False)
    _, optimizer, batches = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3)), batch_size=8),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        wrap_model=False,
    )
    (inputs,) = next(iter(batches))
    with pytest.warns(OpacusPrivacyWarning, match="the loss is a sum"):
        net(inputs).sum().backward()
    torch.testing.assert_close(net.weight.grad_sample, torch.ones(8, 1, 3))
    optimizer.zero_grad()


def test_adaptive_clipping_pays_for_its_count_with_more_noise_on_the_gradient():
    engine, net = PrivacyEngine(), model()
    net, optimizer, batches = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(),
        noise_multiplier=SIGMA,
        max_grad_norm=C,
        clipping="adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=4.0,
        min_clipbound=0.01,
        unclipped_num_std=1.0,
    )
    assert isinstance(optimizer, AdaClipDPOptimizer)
    train(net, optimizer, batches)
    together = (optimizer.gradient_multiplier**-2 + (2.0 * optimizer.unclipped_num_std) ** -2) ** -0.5
    assert together == pytest.approx(SIGMA)
    assert optimizer.max_grad_norm != C
    assert engine.accountant.history == [(SIGMA, BATCH / N, len(batches))]


@pytest.mark.usefixtures("_reproducible")
def test_a_checkpoint_goes_on_with_what_was_spent_and_runs_no_code():
    engine, net, optimizer, batches = private()
    train(net, optimizer, batches)
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=net, optimizer=optimizer, checkpoint_dict={"epoch": 1})
    file.seek(0)
    resumed, other, its_optimizer, _ = private(noise_generator=None)
    assert resumed.load_checkpoint(path=file, module=other, optimizer=its_optimizer)["epoch"] == 1
    assert torch.equal(weights(net), weights(other))
    assert resumed.accountant.history == engine.accountant.history == [(SIGMA, 1.0, 1)]
    file.seek(0)
    other_run = PrivacyEngine()
    other_run.accountant.step(noise_multiplier=2.0, sample_rate=0.5)
    with (
        pytest.warns(UserWarning, match="it was not loaded"),
        pytest.warns(OpacusPrivacyWarning, match="both are counted"),
    ):
        other_run.load_checkpoint(path=file, module=other)
    assert other_run.accountant.history == [(SIGMA, 1.0, 1), (2.0, 0.5, 1)]


def test_a_subclass_that_clips_by_itself_is_refused_and_one_that_says_how_is_followed():
    class ByHand(DPOptimizer):
        def clip_and_accumulate(self):
            for p in self.params:
                p.summed_grad = p.grad_sample.sum(0)

    class Tighter(DPOptimizer):
        @property
        def clipping_policy(self):
            return privet.Flat(0.1)

    for kind, refused in ((ByHand, True), (Tighter, False)):
        net = nn.Linear(3, 1, bias=False)
        hooks = privet.opacus.grad_sample.GradSampleHooks(net)
        optimizer = kind(
            torch.optim.SGD(net.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
        )
        before = net.weight.detach().clone()
        net(torch.ones(1, 3)).sum().backward()
        if refused:
            with pytest.raises(privet.ProtocolError, match="clipping_policy"):
                optimizer.step()
            assert torch.equal(net.weight, before)
        else:
            optimizer.step()
            assert (net.weight.detach() - before).norm() == pytest.approx(0.1, rel=1e-4)
        hooks.cleanup()


def test_a_module_that_is_private_at_the_cores_door_is_refused():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"noise_multiplier": SIGMA, "max_grad_norm": C}
    privet.PrivacyEngine().make_private(module=net, optimizer=optimizer, data_loader=loader(), **options)
    with pytest.raises(privet.ProtocolError, match="made private before"):
        PrivacyEngine().make_private(module=net, optimizer=optimizer, data_loader=loader(), **options)


@pytest.mark.usefixtures("_reproducible")
def test_a_batch_of_which_a_part_is_left_out_is_not_counted_as_a_sampled_one():
    engine, net, optimizer, batches = private(data_loader=loader())
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=3, optimizer=optimizer) as parts:
        drawn = iter(parts)
        train(net, optimizer, [next(drawn)])
        next(drawn)
        optimizer._skips.clear()
        with (
            pytest.warns(OpacusPrivacyWarning, match="2 batches were added up"),
            pytest.warns(UserWarning, match="did not come, whole and fresh"),
        ):
            train(net, optimizer, [next(drawn)])
    assert engine.accountant.history == [(SIGMA / 2, 1.0, 1)]
