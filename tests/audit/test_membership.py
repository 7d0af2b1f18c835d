"""Membership inference: the numbers of the curve, and attacks on models that remember."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from privet.accounting import GaussianEvent
from privet.audit import LikelihoodRatio, Roc, by_class, loss_scores, train_shadows
from privet.audit.plots import plot_bounds, plot_roc
from privet.errors import ConfigurationError

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_area_and_rates_are_their_definitions(members, others):
    roc = Roc(members, others)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert roc.auc == pytest.approx(np.mean(pairs))
    false, true = roc.curve()
    assert (false[0], true[0], false[-1], true[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(false) >= 0).all()
    for rate in (0.0, 0.1, 0.5):
        point = roc.at(rate)
        best = max(np.mean([m > t for m in members]) for t in [*others, -9] if np.mean([o > t for o in others]) <= rate)
        assert point.true_positive_rate == pytest.approx(best)
        assert point.low <= point.true_positive_rate <= point.high


def test_scores_that_tell_all_and_nothing():
    assert Roc([1.0] * 50, [0.0] * 50).at(0.01).true_positive_rate == 1.0
    assert Roc([1.0] * 50, [0.0] * 50).at(0.01).low == pytest.approx(0.025 ** (1 / 50))
    assert Roc([0.0] * 50, [0.0] * 50).auc == 0.5
    assert "AUC 0.500" in repr(Roc([0.0] * 50, [0.0] * 50))
    with pytest.raises(ConfigurationError, match="got none"):
        Roc([], [1.0])


def records(count=80):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 10, generator=g), torch.randint(2, (count,), generator=g)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fitted(indices, steps=60):
    x, y = records()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
    return model


def test_a_model_that_remembers_is_attacked_and_shadows_help():
    members = np.arange(80) < 40
    target = fitted(np.flatnonzero(members).tolist())

    def score(model):
        return loss_scores(model, [records()], loss)

    by_loss = Roc(score(target)[members], score(target)[~members])
    assert by_loss.auc > 0.75
    shadows = train_shadows(fitted, 80, 8, score)
    assert (shadows[1].sum(axis=0) == 4).all()
    for offline in (False, True):
        attack = LikelihoodRatio.of_shadows(*shadows, offline=offline)
        assert Roc(*attack.split(score(target), members)).auc > 0.8
    classes = by_class(score(target), members, records()[1].numpy())
    assert set(classes) == {0, 1}
    assert target.training


def test_too_few_shadows_are_refused():
    with pytest.raises(ConfigurationError, match="shadow models on one side"):
        LikelihoodRatio.of_shadows(np.zeros((3, 5)), np.ones((3, 5), dtype=bool))
    with pytest.raises(ConfigurationError, match="one shape"):
        LikelihoodRatio.of_shadows(np.zeros(5), np.zeros(5))


def test_plots_draw():
    plt = pytest.importorskip("matplotlib.pyplot")
    axes = plot_roc({"loss": Roc([1.0, 2.0, 0.5], [0.0, 0.7, 0.1])}, claimed=GaussianEvent(2.0))
    assert [line.get_label() for line in axes.lines] == ["loss (AUC 0.889)", "what the claim allows", "guessing"]
    axes = plot_bounds([1.0, 4.0], {"mechanism": [0.8, 3.5]})
    assert axes.get_xlabel() == "claimed ε"
    plt.close("all")
