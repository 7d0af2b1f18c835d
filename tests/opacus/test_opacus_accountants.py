"""Accountants, samplers and schedules at Opacus's names, held against the core's accounting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privet.accounting import ComposedEvent, GaussianEvent, PoissonEvent, get_epsilon, repeated
from privet.opacus import OpacusPrivacyWarning
from privet.opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant, create_accountant
from privet.opacus.accountants.utils import get_noise_multiplier
from privet.opacus.data_loader import DPDataLoader
from privet.opacus.optimizers import DPOptimizer
from privet.opacus.schedulers import ExponentialGradClip, LambdaNoise, StepNoise
from privet.opacus.utils.uniform_sampler import UniformWithReplacementSampler

DELTA = 1e-5


def test_equal_steps_are_one_entry_and_all_of_them_are_paid_for():
    accountant = PRVAccountant()
    assert accountant.get_epsilon(DELTA) == 0.0
    for sigma, rate, steps in ((1.1, 0.01, 20), (0.9, 0.02, 10), (5.0, 1.0, 2)):
        for _ in range(steps):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    assert accountant.history == [(1.1, 0.01, 20), (0.9, 0.02, 10), (5.0, 1.0, 2)]
    assert len(accountant) == 32
    event = ComposedEvent(
        (
            repeated(PoissonEvent(0.01, GaussianEvent(1.1)), 20),
            repeated(PoissonEvent(0.02, GaussianEvent(0.9)), 10),
            repeated(GaussianEvent(5.0), 2),
        )
    )
    assert accountant.get_epsilon(DELTA) == pytest.approx(get_epsilon(event, DELTA), rel=1e-6)


def test_no_noise_has_no_finite_cost():
    for kind in (PRVAccountant, RDPAccountant):
        accountant = kind()
        accountant.step(noise_multiplier=0.0, sample_rate=0.1)
        assert accountant.get_epsilon(DELTA) == float("inf")


def test_renyi_takes_the_best_of_the_orders_that_it_is_given():
    accountant = RDPAccountant()
    accountant.history = [(1.5, 0.04, 500)]
    every = [accountant.get_epsilon(DELTA, alphas=[order]) for order in (2.0, 4.0, 8.0, 16.0, 32.0)]
    assert accountant.get_epsilon(DELTA, alphas=[2.0, 4.0, 8.0, 16.0, 32.0]) == min(every)
    assert accountant.get_epsilon(DELTA) <= min(every)


def test_the_gaussian_accountant_is_an_upper_bound_and_says_that_opacus_is_not():
    accountant, exact = GaussianAccountant(), PRVAccountant()
    accountant.history = exact.history = [(1.5, 0.04, 100)]
    with pytest.warns(OpacusPrivacyWarning, match="central limit"):
        assert accountant.get_epsilon(DELTA) >= exact.get_epsilon(DELTA)


def test_the_noise_for_a_target_meets_it():
    sigma = get_noise_multiplier(
        target_epsilon=2.0, target_delta=DELTA, sample_rate=0.02, steps=200, accountant="prv", epsilon_tolerance=0.05
    )
    accountant = create_accountant("prv")
    accountant.history = [(sigma, 0.02, 200)]
    assert 1.95 <= accountant.get_epsilon(DELTA) <= 2.0
    with pytest.raises(ValueError, match="one of the two"):
        get_noise_multiplier(target_epsilon=2.0, target_delta=DELTA, sample_rate=0.02)


def test_batches_are_poisson_and_follow_no_global_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(list(UniformWithReplacementSampler(num_samples=400, sample_rate=0.1)))
    assert [len(batches) for batches in drawn] == [10, 10]
    assert drawn[0] != drawn[1]
    assert 300 < sum(map(len, drawn[0])) < 500
    assert len(UniformWithReplacementSampler(num_samples=49, sample_rate=1 / 49)) == 49


def test_a_loader_has_the_structure_of_a_batch_before_the_first_one():
    dataset = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10))
    inputs, targets = next(batch for batch in DPDataLoader(dataset, sample_rate=0.02) if not len(batch[0]))
    assert inputs.shape == (0, 3)
    assert targets.shape == (0,)
    assert targets.dtype == torch.int64


def test_schedules_change_the_number_that_the_next_step_is_billed_with():
    optimizer = DPOptimizer(
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    step = StepNoise(optimizer, step_size=2, gamma=0.5)
    found = []
    for _ in range(4):
        step.step()
        found.append(optimizer.noise_multiplier)
    assert found == [2.0, 1.0, 1.0, 0.5]
    clip = ExponentialGradClip(optimizer, gamma=0.1)
    clip.step()
    assert optimizer.max_grad_norm == pytest.approx(0.1)
    base = LambdaNoise(optimizer, noise_lambda=lambda epoch: 1.0 + epoch)
    base.step()
    assert optimizer.noise_multiplier == 1.0
    assert "optimizer" not in step.state_dict()
