"""Statistics of clipping: what they are, that they are off until asked for, and that the ledger says so."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Accumulate,
    Adaptive,
    BatchMemoryManager,
    ConfigurationError,
    CSVLogger,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    PerLayer,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    StepStatistics,
    TensorBoardLogger,
)
from privet.gradients.reference import example_gradients
from privet.report import Report
from privet.report.hazards import COLLECTED
from privet.training.statistics import STATISTICS_MARK

torch.set_num_threads(1)
N, BATCH, CLIP = 30, 10, 0.9


def entropy(net: nn.Module, batch: Any) -> torch.Tensor:  # (B,)
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def net_and_data() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,)))
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), data


def door(kind: str, *, policy: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """Returns the door, its loader, and a function that takes a step on a batch."""
    net, data = net_and_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    policy, generator = policy or Flat(CLIP), torch.Generator().manual_seed(5)
    if kind == "explicit":
        mechanism = Mechanism(sampling=Poisson(BATCH / N), clipping=policy, noise=Gaussian(1.0), steps=3)
        step = PrivateStep(
            net,
            optimizer=optimizer,
            mechanism=mechanism,
            loss_per_example=entropy,
            noise_generator=generator,
            **options,
        )
        return step, step.batches(data), step
    engine = PrivacyEngine()
    *_, loader = engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        clipping=policy,
        noise_generator=generator,
        **options,
    )

    def take(batch: Any) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()

    return engine, loader, take


def norms(batch: Any) -> torch.Tensor:  # (parameters, B)
    net, _ = net_and_data()
    rows = [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    found = example_gradients(net, rows, lambda m, b: entropy(m, b).sum())
    return torch.stack([g.flatten(1).double().square().sum(1) for g in found.values()])


DOORS = pytest.mark.parametrize("kind", ["paper", "explicit"])


@DOORS
def test_they_are_those_of_the_batch(kind):
    run, loader, take = door(kind)
    collected = run.collect_statistics(quantiles=(0.25, 1.0))
    assert run.statistics is collected.latest is None
    for number, batch in enumerate(loader):
        take(batch)
        found = run.statistics
        expected = norms(batch).sum(0).sqrt()
        assert (found.step, found.model, found.examples, found.dropped) == (number, 0, len(batch[0]), 0)
        assert found.clipped == pytest.approx(float((expected > CLIP).double().mean()))
        assert found.norms == pytest.approx(
            {0.25: float(expected.quantile(0.25)), 1.0: float(expected.max())}, rel=1e-4
        )
        assert found.clip_norm == CLIP


def test_padded_parts_of_a_batch_are_counted_together():
    run, loader, take = door("explicit", performance=Performance(padded=True, physical_batch_size=3))
    whole, same, other = door("explicit")
    run.collect_statistics()
    whole.collect_statistics()
    for batch, again in zip(loader, same, strict=True):
        take(batch)
        other(again)
        assert run.statistics.norms == pytest.approx(whole.statistics.norms, rel=1e-4)
        assert replace(run.statistics, norms={}) == replace(whole.statistics, norms={})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parts_are_heard_of_once_a_logical_step(accumulate):
    net, data = net_and_data()
    engine, optimizer = PrivacyEngine(), torch.optim.SGD(net.parameters(), lr=0.1)
    *_, loader = engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        accumulate=Accumulate(accumulate, divided=False),
    )
    heard: list[StepStatistics] = []
    engine.collect_statistics(heard.append)
    sizes: list[int] = []
    if accumulate > 1:
        for i, (x, y) in enumerate(loader):
            sizes.append(len(x))
            F.cross_entropy(net(x), y).backward()
            if i % accumulate == accumulate - 1:
                optimizer.step()
    else:
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as parts:
            for x, y in parts:
                sizes.append(len(x))
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
    assert len(heard) == engine.ledger.steps == loader.steps_per_pass
    assert sum(found.examples for found in heard) == sum(sizes)


def test_groups_are_clipped_if_any_of_them_is():
    run, loader, take = door("paper", policy=PerLayer(CLIP))
    run.collect_statistics()
    batch = next(iter(loader))
    take(batch)
    layers = norms(batch).reshape(2, 2, -1).sum(1).sqrt()
    assert run.statistics.clipped == pytest.approx(float((layers > CLIP / math.sqrt(2)).any(0).double().mean()))


def test_a_gradient_that_is_not_finite_is_dropped_and_an_empty_batch_has_no_norms():
    step, _, take = door("explicit", expected_batch_size=BATCH)
    step.collect_statistics()
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    with pytest.warns(UserWarning, match="did not come, whole"):
        take((x, y))
    x[2] = float("inf")
    take((x, y))
    assert (step.statistics.examples, step.statistics.dropped) == (6, 1)
    assert all(math.isfinite(norm) for norm in step.statistics.norms.values())
    take((x[:0], y[:0]))
    assert (step.statistics.examples, step.statistics.dropped, step.statistics.clipped) == (0, 0, 0.0)
    assert all(math.isnan(norm) for norm in step.statistics.norms.values())


def test_adaptive_clipping_shows_the_bound_of_the_step():
    run, loader, take = door("paper", policy=Adaptive(CLIP))
    run.collect_statistics()
    take(next(iter(loader)))
    assert run.statistics.clip_norm == CLIP != run.mechanisms[0].clipping.clip_norm


# -- that they are not private -----------------------------------------------------------------------------------------


@DOORS
def test_they_are_off_until_they_are_asked_for_and_the_ledger_says_so(kind):
    run, loader, take = door(kind)
    take(next(iter(loader)))
    with pytest.raises(ProtocolError, match="no noise"):
        _ = run.statistics
    assert STATISTICS_MARK not in run.ledger.marks
    run.collect_statistics()
    assert STATISTICS_MARK == COLLECTED
    assert COLLECTED in run.ledger.marks
    if kind == "paper":
        return  # a report is of the ledger alone
    text = Report.of(run.ledger, delta=1e-5).to_markdown()
    assert text.count("lip fractions and norms of gradients were") == 2  # the mark, and the hazard


def test_nothing_is_collected_of_what_is_not_private():
    with pytest.raises(ProtocolError, match="make_private first"):
        PrivacyEngine().collect_statistics()


def test_they_change_nothing_that_is_released():
    plain, loader, take = door("explicit")
    for batch in loader:
        take(batch)
    watched, loader, take = door("explicit")
    watched.collect_statistics()
    for batch in loader:
        take(batch)
    assert watched.ledger.phases == plain.ledger.phases
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a.detach(), b.detach())


# -- loggers -----------------------------------------------------------------------------------------------------------


FOUND = StepStatistics(
    step=3, model=0, examples=7, dropped=1, clipped=0.5, clip_norm=1.0, norms={0.25: 0.125, 0.5: 2.0}
)


def test_a_csv_file_has_a_line_for_each_step_and_is_gone_on_with(tmp_path):
    path = tmp_path / "statistics.csv"
    CSVLogger(path)(FOUND)
    CSVLogger(path)(replace(FOUND, step=4))
    with path.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["step"] for row in rows] == ["3", "4"]
    assert rows[0] == {
        "step": "3",
        "model": "0",
        "examples": "7",
        "dropped": "1",
        "clipped": "0.5",
        "clip_norm": "1.0",
        "norm_0.25": "0.125",
        "norm_0.5": "2.0",
    }
    with pytest.raises(ConfigurationError, match="has the columns step"):
        CSVLogger(path)(replace(FOUND, norms={0.9: 1.0}))


def test_tensorboard_gets_scalars():
    class Writer:
        def __init__(self) -> None:
            self.written: dict[str, tuple[float, int]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.written[name] = (value, step)

    writer: Any = Writer()
    TensorBoardLogger(writer)(FOUND)
    TensorBoardLogger(writer, prefix="dp")(replace(FOUND, model=1))
    assert writer.written["privet/clipped"] == (0.5, 3)
    assert writer.written["dp/1/norm_0.25"] == (0.125, 3)


def test_tensorboard_is_imported_late_and_its_absence_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigurationError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)


# -- gradients that a script looks at before the step ------------------------------------------------------------------


def test_norms_of_noisy_gradients_are_clipped_in_a_hook_of_the_step():
    """What docs/statistics.md shows in place of clip_grad_norm_ before the step."""
    net, data = net_and_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    *_, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    found: list[float] = []

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found.append(float(nn.utils.clip_grad_norm_(net.parameters(), 1e-3)))

    optimizer.register_step_pre_hook(clip)
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    x, y = next(iter(loader))
    F.cross_entropy(net(x), y).backward()
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)) == 0.0
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert found[0] > 1e-3
    assert float((after - before).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)
