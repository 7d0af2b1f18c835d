"""The audit of a real training by planted canaries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine
from privet.accounting import GaussianEvent
from privet.audit import Guesses, TrainingAudit, plant
from privet.errors import ConfigurationError


def data(count=60, width=12):
    g = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, width, generator=g), torch.randint(3, (count,), generator=g))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 3))


def train(dataset, epochs, noise=None):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loader = DataLoader(dataset, batch_size=40)
    engine = PrivacyEngine()
    if noise is not None:
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(1),
        )
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model, engine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mislabelled", "random", "blank"])
def test_a_training_without_noise_remembers_and_one_with_noise_keeps_its_claim(kind):
    planted = plant(data(), 120, "random" if kind == "blank" else kind, seed=1)
    model, _ = train(planted.dataset, 60)
    open_ = planted.audit(planted.losses(model, loss), delta=1e-5)
    assert open_.lower_bound > 0.5
    assert open_.lower_bound_gaussian > open_.lower_bound
    assert open_.accuracy > 0.65
    assert open_.refuted is None
    model, engine = train(planted.dataset, 3, noise=1.0)
    private = planted.audit(planted.losses(model, loss), delta=1e-5, claimed=engine)
    assert private.refuted is False
    assert private.lower_bound <= private.lower_bound_gaussian <= private.claimed


def test_a_claim_that_is_too_small_is_refuted():
    planted = plant(data(), 120, "mislabelled", seed=1)
    model, _ = train(planted.dataset, 60)
    scores = planted.losses(model, loss)
    assert planted.audit(scores, delta=1e-5, claimed=0.3).refuted
    assert planted.audit(scores, delta=1e-5, claimed=GaussianEvent(5.0)).refuted
    assert not planted.audit(scores, delta=1e-5, claimed=50.0).refuted


def test_perfect_scores_give_the_bound_of_all_coins():
    planted = plant(data(), 200, "mislabelled", seed=2)
    audit = planted.audit(planted._members.astype(float), delta=1e-5, higher_is_member=True)
    least = min(planted._members.sum(), (~planted._members).sum())
    assert audit.guesses == audit.correct >= 2 * least * 0.6
    # Seven ways of guessing were tried, so each has a seventh of what may go wrong.
    expected = Guesses(200, audit.guesses, audit.correct).gaussian_epsilon(1e-5, confidence=0.95, tries=7)
    assert audit.lower_bound_gaussian == expected
    assert json.loads(audit.to_json())["correct"] == audit.correct
    assert "guesses were right" in str(audit)


def test_scores_that_know_nothing_say_nothing():
    rng = np.random.default_rng(0)
    refuted = 0
    for _ in range(100):
        members = rng.random(100) < 0.5
        refuted += TrainingAudit.of(rng.normal(size=100), members, delta=1e-5, claimed=0.01).refuted
    assert refuted <= 5 + 7  # 5 % is allowed; 12 of 100 at that rate are less likely than 0.5 %


@pytest.mark.filterwarnings("ignore")
def test_alignment_sees_a_member_in_each_private_gradient():
    planted = plant(data(20), 60, "random", seed=5)
    model = network()
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(planted.dataset, batch_size=len(planted.dataset)),
        noise_multiplier=0.05,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(1),
    )
    with planted.aligned(model, loss, chunk=32) as scores:
        for _ in range(10):
            for x, y in loader:
                F.cross_entropy(private(x), y).backward()
                optimizer.step()
    audit = planted.audit(scores, delta=1e-5)
    assert audit.accuracy > 0.6
    assert audit.lower_bound_gaussian > 0.0
    assert private.training


def test_a_training_goes_on_with_the_same_canaries(tmp_path):
    planted = plant(data(), 30, "random", seed=4)
    planted.save(tmp_path / "canaries.pt")
    again = type(planted).load(tmp_path / "canaries.pt", data())
    assert len(again.dataset) == len(planted.dataset)
    assert np.array_equal(again._members, planted._members)
    for i in (60, len(again.dataset) - 1):
        assert torch.equal(again.dataset[i][0], planted.dataset[i][0])


def test_tokens_get_random_sequences_of_the_datas_tokens():
    tokens = TensorDataset(torch.randint(5, 9, (30, 16)))
    planted = plant(tokens, 40, "random", seed=1)
    values = torch.stack([record[0] for record in planted._records])
    assert values.dtype == torch.int64
    assert set(values.unique().tolist()) == {5, 6, 7, 8}


def test_bad_canaries_are_refused():
    known = data()
    own = [known[i] for i in range(20)]
    with pytest.raises(ConfigurationError, match="is one of the canaries"):
        plant(known, kind=own)
    with pytest.raises(ConfigurationError, match="are the same"):
        plant(known, kind=[(torch.ones(12), 1)] * 20)
    with pytest.raises(ConfigurationError, match="hold no label"):
        plant(TensorDataset(torch.randn(20, 4)), 20)
    with pytest.raises(ConfigurationError, match="at least 10"):
        plant(known, 3)
    with pytest.raises(ConfigurationError, match="kind must be"):
        plant(known, 20, "wrong")
    with pytest.raises(ConfigurationError, match="finite score for each"):
        plant(known, 20, seed=1).audit(np.full(20, np.nan), delta=1e-5)
    with pytest.raises(ConfigurationError, match="no reduction"):
        plant(known, 20, seed=1).losses(network(), lambda m, b: F.cross_entropy(m(b[0]), b[1])[None])
