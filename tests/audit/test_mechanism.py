"""The audit of a mechanism finds every mistake that was planted, and lets what is right pass."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from privet import BatchMemoryManager, Flat, Gaussian, Mechanism, Partition, PrivacyEngine, PrivateStep
from privet.accounting import GaussianEvent
from privet.audit import assert_private, audit_mechanism
from privet.errors import ConfigurationError
from tests.audit.trainings import PlainTraining, Tied, data

MISTAKES = {
    "noise divided by the batch size": {},
    "noise divided by the world size": {},
    "noise divided by the root of the world size": {},
    "noise once per physical batch at the wrong scale": {},
    "a clip norm that changes between clip and noise": {},
    "clipping after averaging": {},
    "one stream for two shards": {},
    "noise used again in the next step": {},
    "an example in the sum twice": {},
    "rows of one example counted as several": {},
    "a non-private gradient beside the private one": {},
    "a partition billed once for five passes": {"steps": 5},
    "a shuffled loader billed as Poisson": {"rate": 0.1, "steps": 30},
    "a rate twice what is billed": {"rate": 0.1, "steps": 20},
}


def model():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    train = PlainTraining(mistake=mistake, **MISTAKES[mistake])
    with pytest.raises(AssertionError, match="the claim is refuted"):
        assert_private(train, model=model(), dataset=data(), canaries=160, seed=1, rows=False)


@pytest.mark.parametrize("options", [{}, {"rate": 0.1, "steps": 20}, {"sigma": 0.4, "steps": 1}, {"sigma": 8.0}])
def test_what_is_right_passes(options):
    for seed in range(2):
        train = PlainTraining(seed=seed, **options)
        audit = assert_private(train, model=model(), dataset=data(), canaries=160, seed=seed)
    assert audit.noise_ratio == pytest.approx(1.0, rel=0.5)


def test_a_norm_without_the_cross_term_of_tied_weights_is_found_by_rows():
    options = {"sigma": 0.2, "steps": 30, "rate": 0.1}
    torch.manual_seed(0)
    right = audit_mechanism(PlainTraining(**options), model=Tied(), dataset=data(), canaries=120, seed=1)
    assert right.passed
    assert right.row_ratio == pytest.approx(1.0, rel=0.15)
    wrong = PlainTraining(mistake="tied weights without the cross term", **options)
    audit = audit_mechanism(wrong, model=Tied(), dataset=data(), canaries=120, seed=1)
    assert not audit.passed
    assert audit.row_ratio < 0.9
    assert audit.noise_ratio == pytest.approx(1.0, rel=0.15)  # canaries of their own do not feel it


def test_a_step_that_is_skipped_on_empty_batches_is_found():
    options = {"rate": 0.004, "steps": 40}
    wrong = PlainTraining(mistake="a step skipped on an empty batch", **options)
    audit = audit_mechanism(wrong, model=model(), dataset=data(8), canaries=120, seed=1)
    assert any("tells who was drawn" in finding for finding in audit.findings)
    assert audit_mechanism(PlainTraining(**options), model=model(), dataset=data(8), canaries=120, seed=1).passed


# -- the library's own doors -------------------------------------------------------------------------------------------


def through_engine(sigma, batch_size=None, epochs=1, **options):
    def train(model, dataset):
        engine = PrivacyEngine()
        loader = torch.utils.data.DataLoader(dataset, batch_size=len(dataset) if batch_size is None else batch_size)
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.Adam(model.parameters()),
            data_loader=loader,
            noise_multiplier=sigma,
            max_grad_norm=0.7,
            noise_generator=torch.Generator().manual_seed(3),
            **options,
        )
        for _ in range(epochs):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return engine

    return train


def through_virtual_steps(sigma):
    def train(model, dataset):
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(dataset, batch_size=100),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(3),
        )
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=32, optimizer=optimizer) as parts:
            for _ in range(2):
                for x, y in parts:
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return engine

    return train


def through_step(sigma):
    def train(model, dataset):
        step = PrivateStep(
            model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            mechanism=Mechanism(
                sampling=Partition(batch_size=len(dataset)), clipping=Flat(2.0), noise=Gaussian(sigma), steps=2
            ),
            loss_per_example=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            noise_generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2):
            for batch in step.batches(dataset):
                step(batch)
        return step

    return train


NETWORK = [nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "train",
    [
        through_engine(1.0),
        through_engine(0.6, batch_size=40, epochs=2),
        through_engine(1.0, batch_size=40, grad_sample_mode="hooks"),
        through_engine(1.0, clipping="automatic"),
        through_virtual_steps(0.6),
        through_step(1.0),
    ],
)
def test_the_librarys_own_trainings_pass(train):
    torch.manual_seed(0)
    audit = assert_private(train, model=nn.Sequential(*NETWORK), dataset=data(), canaries=400, seed=2)
    assert audit.noise_ratio == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_the_lower_bound_is_near_the_claim_for_a_gaussian_without_sampling(sigma):
    audit = assert_private(
        through_engine(sigma, epochs=4), model=model(), dataset=data(), canaries=6000, seed=4, rows=False
    )
    assert 0.8 * audit.claimed <= audit.lower_bound <= audit.claimed


def test_without_noise_the_lower_bound_is_infinite_and_so_is_the_claim():
    audit = audit_mechanism(through_engine(0.0), model=model(), dataset=data(), canaries=200, seed=1, rows=False)
    assert audit.lower_bound == audit.claimed == math.inf
    assert json.loads(audit.to_json())["lower_bound"] == "inf"


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_too_few_canaries_say_how_many_are_needed():
    with pytest.raises(ConfigurationError, match=r"Expected at least \d+"):
        audit_mechanism(PlainTraining(), model=model(), dataset=data(), canaries=10)


def test_canaries_that_do_not_reach_the_model_are_no_proof():
    def train(model, dataset):
        return PlainTraining()(model, [(x + 1.0, y) for x, y in (dataset[i] for i in range(len(dataset)))])

    with pytest.raises(ConfigurationError, match="no canary met the model"):
        audit_mechanism(train, model=model(), dataset=data(), canaries=120)


def test_a_training_without_a_bill_is_refused():
    def train(model, dataset):
        PlainTraining()(model, dataset)

    with pytest.raises(ConfigurationError, match="returned NoneType"):
        audit_mechanism(train, model=model(), dataset=data(), canaries=120)


def test_a_training_that_does_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="no optimizer step"):
        audit_mechanism(lambda model, dataset: GaussianEvent(1.0), model=model(), dataset=data(), canaries=120)
