"""Averages of weights: against the recursion in float64, counted by releases, kept in checkpoints, free of charge."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import BatchMemoryManager, ConfigurationError, PrivacyEngine, ProtocolError, WeightAverage

SGD = lambda net: torch.optim.SGD(net.parameters(), lr=0.3)  # noqa: E731


def followed(run: Any) -> list[list[torch.Tensor]]:
    """Returns a list of the weights of now, and of those after each step to come."""
    seen = [run.weights]
    run.optimizer.register_step_post_hook(lambda *rest: seen.append(run.weights))
    return seen


def expected(seen: list[list[torch.Tensor]], *, decay: float | None, start: int = 0) -> list[torch.Tensor]:
    """Returns the average of weights, the first of which are those before any step, in float64."""
    wide = [[t.double() for t in each] for each in seen]
    if decay is None:
        rest = wide[1 + start :]
        return [torch.stack([each[i] for each in rest]).mean(0) for i in range(len(wide[0]))]
    average = wide[start]
    for t, each in enumerate(wide[1 + start :]):
        now = min(decay, (1 + t) / (10 + t))
        average = [now * a + (1 - now) * w for a, w in zip(average, each, strict=True)]
    return average


@pytest.mark.parametrize(("decay", "start"), [(0.999, 0), (0.2, 0), (0.9, 2), (None, 0), (None, 3)])
def test_the_average_is_the_recursion(door: str, make_run: Any, decay: float | None, start: int) -> None:
    run = make_run(door, SGD)
    average, seen = WeightAverage(run.net, run.optimizer, decay=decay, start=start), followed(run)
    run.train()
    assert len(seen) == 6
    assert average.updates == 5
    twin = average.averaged_model()
    for found, right in zip(twin.parameters(), expected(seen, decay=decay, start=start), strict=True):
        assert torch.allclose(found.double(), right, atol=1e-6)
    wrong = expected(seen, decay=decay, start=start + 1)
    assert not all(torch.allclose(p.double(), w, atol=1e-4) for p, w in zip(twin.parameters(), wrong, strict=True))
    assert run.door.ledger.steps == 5, "averaging costs nothing"
    assert not twin.training
    if door == "paper":  # where the model itself is watched
        with pytest.raises(ProtocolError, match="copy of a private model"):
            twin.train()(torch.zeros(1, 3))


def test_the_model_has_the_average_inside_of_the_context_alone(door: str, make_run: Any) -> None:
    run = make_run(door, SGD)
    average = WeightAverage(run.net, run.optimizer)
    run.train()
    own, twin = run.weights, average.averaged_model()
    with pytest.raises(ZeroDivisionError), average.applied() as model:  # noqa: PT012 - what is inside is tested
        assert model is run.net
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(run.weights, own, strict=True))
    run.train()
    assert average.updates == 10


def test_only_releases_count_in_virtual_steps() -> None:
    engine, net = PrivacyEngine(), nn.Linear(3, 2)
    net, optimizer, loader = engine.make_private(
        module=net,
        optimizer=SGD(net),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    average, backwards = WeightAverage(net, optimizer, decay=0.9), 0
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for (x,) in parts:
            optimizer.zero_grad()
            net(x).square().sum(1).mean().backward()
            optimizer.step()
            backwards += 1
    assert backwards > 5
    assert average.updates == engine.ledger.steps == 5


def test_a_resumed_run_goes_on_with_its_average(make_run: Any) -> None:
    run = make_run("explicit", SGD, steps=3)
    average, file = WeightAverage(run.net, run.optimizer, decay=0.9), io.BytesIO()
    run.train().door.save_checkpoint(file, extra={"average": average.state_dict()})
    file.seek(0)
    other = make_run("explicit", SGD, steps=3, seed=2)
    goes_on = WeightAverage(other.net, other.optimizer, decay=0.9)
    goes_on.load_state_dict(other.door.load_checkpoint(file)["average"])
    assert goes_on.updates == 3
    for a, b in zip(average.averaged_model().parameters(), goes_on.averaged_model().parameters(), strict=True):
        assert torch.equal(a, b)
    other.train()
    assert goes_on.updates == 6
    with pytest.raises(ConfigurationError, match="the same names and shapes"):
        goes_on.load_state_dict({"updates": 1, "averages": {"weight": torch.zeros(2)}})
    assert goes_on.updates == 6


def test_a_weight_in_sixteen_bits_is_averaged_in_more(make_run: Any) -> None:
    run = make_run("explicit", lambda net: torch.optim.SGD(net.parameters(), lr=0.0))
    average = WeightAverage(run.net.bfloat16(), run.optimizer, decay=1.0)
    assert {value.dtype for value in average.state_dict()["averages"].values()} == {torch.float32}
    assert next(average.averaged_model().parameters()).dtype == torch.bfloat16


def test_what_cannot_be_right_is_refused_in_words(make_run: Any) -> None:
    run = make_run("explicit", SGD)
    with pytest.raises(ConfigurationError, match="decay"):
        WeightAverage(run.net, run.optimizer, decay=1.5)
    with pytest.raises(ConfigurationError, match="not the optimizer of a private module"):
        WeightAverage(run.net, SGD(run.net))
    average = WeightAverage(run.net, run.optimizer)
    run.net.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigurationError, match="extra"):
        average.update()
