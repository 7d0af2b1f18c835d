"""What a forward writes: found by path if it depends on the data, and put back in either case."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError, UnsupportedModelError
from privet.gradients.capture.other_values import in_double, perturbed, to_double
from privet.gradients.capture.state import State
from privet.validation import find_mixing
from tests.contracts.doors import DOORS, door_sum

D = 4


class ActNorm(nn.Module):
    """Sets a trainable parameter from the first batch."""

    def __init__(self, *, way: str = "copy") -> None:
        super().__init__()
        self.place, self.last, self.done, self.way = nn.Parameter(torch.zeros(D)), nn.Linear(D, 2), False, way

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                (self.place if self.way == "copy" else self.place.data).copy_(-x.mean(0))
            self.done = True
        return self.last(x + self.place)


class FrozenMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.last = nn.Parameter(torch.zeros(D), requires_grad=False), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.last(x)


class NewBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "centre"):
            self.register_buffer("centre", x.detach().mean(0), persistent=False)
        return self.last(x)


class Attribute(nn.Module):
    """Keeps something of the data, in one of several forms."""

    FORMS = ("tensor", "list", "dict", "number", "array", "inner")

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.last = form, nn.Linear(D, 2)
        self.kept: Any = {"list": [], "dict": {}, "array": np.zeros(2)}.get(form)

    def forward(self, x: Tensor) -> Tensor:
        value = x.detach().mean()
        if self.form == "list":
            self.kept.append(value)
        elif self.form == "dict":
            self.kept["mean"] = value
        elif self.form == "array":
            self.kept[0] = float(value)
        elif self.form == "inner":
            self.last.seen = value
        else:
            self.kept = float(value) if self.form == "number" else value
        return self.last(x)


class Harmless(nn.Module):
    """Counts, and keeps what depends on sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.calls, self.tables = nn.Linear(D, 2), 0, {}
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count.add_(1)
        if not hasattr(self, "mask"):
            self.mask = torch.ones(D, D).tril()
        table = self.tables.setdefault(x.shape[1], torch.arange(x.shape[1]) / 10)
        self.weight_now = self.last.weight / self.last.weight.norm()  # as old parametrizations do
        return self.last(x @ self.mask.to(x) + table)


WRITERS = [
    (ActNorm, "parameter place"),
    (lambda: ActNorm(way="data"), "parameter place"),
    (FrozenMean, "parameter mean"),
    (NewBuffer, "attribute centre"),
    *((lambda form=form: Attribute(form), "attribute ") for form in Attribute.FORMS),
]


@pytest.mark.parametrize(("made", "name"), WRITERS)
def test_state_written_from_the_data_is_found_by_its_path_and_put_back(made: Any, name: str) -> None:
    model = made()
    values = {n: p.clone() for n, p in model.named_parameters()}
    attributes = set(vars(model)) | set(vars(model.last))
    found = find_mixing(model, (torch.randn(5, D),))
    assert any(name in each and "written from the data" in each for each in found), found
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert set(vars(model)) | set(vars(model.last)) == attributes
    assert not list(model.buffers())
    assert not getattr(model, "done", False)
    kept = getattr(model, "kept", None)
    assert not np.any(kept) if isinstance(kept, np.ndarray) else not kept


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("made", "name"), WRITERS)
def test_both_doors_refuse_it(made: Any, name: str, door: str) -> None:
    with pytest.raises((UnsupportedModelError, CoverageError), match=r"written from the data|mixed"):
        door_sum(door, made(), (torch.randn(5, D),), loss=lambda m, b: m(b[0]).square().sum(1))


@pytest.mark.parametrize("door", DOORS)
def test_counters_and_tables_that_do_not_depend_on_the_data_are_not_refused(door: str) -> None:
    model = Harmless()
    assert find_mixing(model, (torch.randn(5, D),)) == []
    assert (model.calls, int(model.count), hasattr(model, "mask"), model.tables) == (0, 0, False, {})
    door_sum(door, model, *[(torch.randn(5, D),)] * 5, loss=lambda m, b: m(b[0]).square().sum(1))


def test_state_holds_generators_and_modules_that_are_held_aside() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.torch, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
            self.teacher = [nn.BatchNorm1d(D)]

        def forward(self, x: Tensor) -> Tensor:
            shift = torch.rand((), generator=self.torch) + self.python.random() + self.numpy.random()
            self.teacher[0](x)
            return x + shift

    model, x = Aside(), torch.randn(5, D)
    state = State(model)
    first = model(x)
    assert not torch.equal(model(x), first)
    assert {"teacher[0].running_mean", "teacher[0].running_var"} <= set(state.changes())
    state.restore()
    assert state.changes() == {}
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_other_values_are_put_back_to_the_last_bit(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.some = nn.Parameter(torch.randn(50, dtype=dtype))
    model.none = nn.Parameter(torch.zeros(3, dtype=dtype))
    model.part = nn.Parameter(torch.tensor([0.0, 1.0], dtype=dtype))
    model.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}

    def interrupted() -> None:
        with perturbed(model), in_double(model):
            assert all(p.dtype in {torch.float64, torch.complex128} for p in model.parameters())
            assert bool((model.none != 0).all() & (model.part != 0).all())
            moved = (model.some.detach() / before["some"][1] - 1).abs()
            assert float(moved.min()) >= 0.004
            assert float(moved.max()) <= 0.02
            assert torch.equal(model.frozen, before["frozen"][1].to(model.frozen.dtype))
            with torch.no_grad():
                model.none.fill_(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for name, p in model.named_parameters():
        assert (p.data_ptr(), p.dtype) == (before[name][0], dtype)
        assert torch.equal(p, before[name][1])


def test_inputs_in_double_keep_their_whole_numbers() -> None:
    found = to_double({"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "n": 3})
    assert (found["x"].dtype, found["ids"].dtype, found["n"]) == (torch.float64, torch.int64, 3)
