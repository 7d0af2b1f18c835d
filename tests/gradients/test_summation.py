"""The sum as a whole: the memory that it may keep, and what it counts."""

from __future__ import annotations

import torch
from torch import nn

from privet.clipping import Flat
from privet.gradients import use
from privet.gradients.summation import clipped_sum
from tests.contracts.doors import reference, relative_error
from tests.gradients.harness import recorded_of, trainable


def test_rows_are_kept_up_to_an_allowance_over_the_whole_model(monkeypatch):
    net = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]).double()
    batch = (torch.randn(4, 200, 6, dtype=torch.float64),)

    def loss(module, b):
        return module(b[0]).square().sum((1, 2))

    kept = []
    remembered = use.Uses.remembered

    def counting(self, compute):
        kept.append(self)
        return remembered(self, compute)

    monkeypatch.setattr(use.Uses, "remembered", counting)
    expected = reference(net, batch, loss, Flat(0.5))
    counts = {}
    for bytes_allowed in (2**30, 3000, 0):
        monkeypatch.setattr(use.Allowance.__init__, "__defaults__", (bytes_allowed,))
        recorded = recorded_of(net, batch, loss)
        kept.clear()
        found = dict(clipped_sum(recorded, trainable(net), Flat(0.5)).values)
        counts[bytes_allowed] = sum(u.shape == (6, 6) for u in kept)
        assert relative_error(found, expected) < 1e-9
    assert counts[2**30] == 5
    assert 0 < counts[3000] < 5
    assert counts[0] == 0


def test_examples_whose_norm_is_not_finite_are_counted():
    net = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    x[1] = float("inf")
    x[3] = float("nan")
    clipped = clipped_sum(recorded_of(net, (x,), lambda m, b: m(b[0]).square().sum(1)), trainable(net), Flat(1.0))
    assert int(clipped.statistics["dropped"]) == 2
    assert all(value.isfinite().all() for value in clipped.values.values())
