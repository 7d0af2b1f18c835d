"""One backward is taken until it would keep more than the budget; then two, with the same result."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from privet import Flat, Gaussian, Mechanism, Performance, PerLayer, Poisson, PrivateStep
from privet.errors import ConfigurationError

BATCH = 16
KEPT = BATCH * 4 * (4 + 2)  # of a layer from 4 to 2 features in float32: its inputs, and the gradient of its outputs


def trained(performance, *, clipping=None):
    """Returns the step after two batches, and the weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = nn.Linear(4, 2), torch.randn(4 * BATCH, 4)
        if clipping is not None:
            model = nn.Sequential(model, nn.Linear(2, 2))
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(
            sampling=Poisson(0.25), clipping=Flat(0.1) if clipping is None else clipping, noise=Gaussian(1.0), steps=2
        ),
        loss_per_example=lambda model, batch: model(batch[0]).square().sum(1),
        performance=performance,
        noise_generator=torch.Generator().manual_seed(1),
    )
    for batch in step.batches(TensorDataset(data)):
        step(batch)
    return step, nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    ("performance", "passes"),
    [
        (Performance(), 1),
        (Performance(activation_budget=KEPT), 1),
        (Performance(activation_budget=KEPT - 1), 2),
        (Performance(activation_budget=KEPT - 1, physical_batch_size=BATCH - 1), 1),
        (Performance(activation_budget=KEPT // 2 - 1, physical_batch_size=BATCH // 2), 2),
    ],
)
def test_the_budget_is_for_a_physical_batch(performance, passes):
    step, weights = trained(performance)
    assert ("passes", str(passes)) in step._rows()
    assert torch.allclose(weights, trained(Performance())[1], rtol=0, atol=1e-7)


def test_a_policy_of_several_groups_takes_one_backward_whatever_it_keeps():
    step, _ = trained(Performance(activation_budget=1), clipping=PerLayer(0.1))
    assert ("passes", "1") in step._rows()


@pytest.mark.parametrize("options", [{"passes": 1}, {"passes": 2}, {"compile": True}])
def test_a_budget_beside_what_it_decides_is_refused(options):
    with pytest.raises(ConfigurationError, match="activation_budget decides between one and two backwards"):
        Performance(activation_budget=100, **options)


@pytest.mark.parametrize("budget", [0, -1, 1.5, True])
def test_a_budget_is_a_whole_number_of_bytes(budget):
    with pytest.raises(ConfigurationError, match="activation_budget"):
        Performance(activation_budget=budget)
