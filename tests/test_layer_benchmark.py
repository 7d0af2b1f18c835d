"""The benchmark of single layers measures what it says: right layers, right sums, limits told beforehand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import layer_cell
from benchmarks.layer_cell import BATCHES, LAYERS, losses, privet, timed
from benchmarks.layers import Measured, beyond, report
from privet import Flat
from privet.gradients.passes.one_pass import OnePass
from privet.gradients.reference import example_gradients
from tests.contracts.doors import assert_exact, expected_sum


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_as_described(name):
    described = LAYERS[name]
    layer = described.build()
    assert sum(p.numel() for p in layer.parameters()) == described.parameters
    assert layer(described.inputs(2)).shape == (2, *described.output)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "conv"])
def test_what_is_timed_as_privet_is_the_clipped_sum_of_the_reference(name, monkeypatch):
    torch.manual_seed(0)
    described, found = LAYERS[name], []
    inner = OnePass.clipped_sum

    def kept(self, *args, **kwargs):
        found.append(inner(self, *args, **kwargs)[0])
        return found[-1], None

    monkeypatch.setattr(OnePass, "clipped_sum", kept)
    layer, x, y = described.build(), described.inputs(5), torch.randn(5, *described.output)
    rows = example_gradients(
        layer, [(x[i : i + 1], y[i : i + 1]) for i in range(5)], lambda m, each: losses(m, each).sum()
    )
    privet(layer, (x, y))()
    expected = expected_sum(rows, Flat(1.0))
    assert_exact(found[0].values, expected)


def test_turns_give_every_contender_a_factor_and_torch_itself_one(monkeypatch):
    now = 0.0

    def lasting(seconds):
        def step():
            nonlocal now
            now += seconds

        return step

    monkeypatch.setattr(layer_cell, "time", SimpleNamespace(perf_counter=lambda: now))  # no busy machine slows it
    found = timed({"torch.nn": lasting(1e-3), "privet": lasting(5e-3)}, seconds=0.1)
    assert found["torch.nn"]["factor"] == pytest.approx(1.0)
    assert found["privet"]["factor"] == pytest.approx(5.0)
    assert found["privet"]["ms"] == pytest.approx(5.0)


def test_limits_leave_out_what_is_too_large_or_too_slow_and_say_why():
    assert "GFLOP" in str(beyond("conv", 2048, "torch.nn", gib=6, gflop=150))
    assert "GiB" in str(beyond("embedding", 2048, "privet hooks", gib=6, gflop=150))
    assert beyond("embedding", 2048, "privet", gib=6, gflop=150) is None
    assert all(beyond("linear", batch, "opacus", gib=6, gflop=150) is None for batch in BATCHES)


def test_the_page_shows_factors_and_lists_what_was_left_out(tmp_path):
    held = Measured(tmp_path / "layers.json")
    where = {"layer": "linear", "batch": 64}
    held.add(
        [
            {**where, "kind": "time", "contender": "torch.nn", "ms": 2.0, "factor": 1.0, "threads": 1},
            {**where, "kind": "time", "contender": "privet", "ms": 5.0, "factor": 2.5, "threads": 1},
            {**where, "kind": "memory", "contender": "torch.nn", "mib": 0.5},
            {**where, "kind": "memory", "contender": "privet", "mib": 3.0},
            {**where, "kind": "memory", "contender": "opacus", "left_out": "too large"},
        ]
    )
    again = Measured(held.path)
    assert again.rows == held.rows
    assert again.factor("memory", "linear", 64, "privet") == 3.0
    page = report(again)
    assert "| linear | 64 | 2 | 2.5 | - | - |" in page
    assert "* linear 64, opacus: too large" in page
    assert json.loads(held.path.read_text(encoding="utf-8"))["machine"]["versions"]["torch"]
