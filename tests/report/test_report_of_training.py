"""A report of a run at the paper's door: what the run left in its ledger is what is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine
from privet.report import Report


def trained(engine, *, left_out=(), **options):
    """Trains one pass of about four steps; the batches at the places `left_out` are not trained on."""
    data = TensorDataset(torch.ones(32, 3), torch.zeros(32, dtype=torch.long))
    model = nn.Linear(3, 2)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=3.0,
        max_grad_norm=1.0,
        **options,
    )
    for place, (inputs, targets) in enumerate(loader):
        if place in left_out:
            continue
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def test_sampler_noise_and_steps_are_those_of_the_run():
    engine = PrivacyEngine()
    trained(engine)
    facts = Report.of(engine.ledger, delta=1e-3, dataset_size=32).facts
    assert facts.epsilon.upper == pytest.approx(engine.get_epsilon(delta=1e-3), rel=1e-3)
    assert (facts.steps, facts.relation, facts.marks) == (4, "zero_out", ())
    text = Report(facts).to_markdown()
    assert "| 1 | 4 | Poisson | 0.25 | 3 |" in text


def test_a_shuffled_loader_and_marks_are_said():
    engine = PrivacyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the batch that is left out
        trained(engine, left_out=[1], noise_generator=torch.Generator().manual_seed(1))
    trained(engine, poisson_sampling=False)
    text = Report.of(engine.ledger, delta=1e-3).to_markdown()
    assert "* reproducible key: a run had a reproducible key" in text
    assert "* batches left out: batches of a pass were left out" in text
    assert "nothing is amplified" in text
    assert "| partition |" in text
