"""What mixes examples before the model is found by its name, wherever it is held."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.validation import refuse_mixed_records

DATA = TensorDataset(torch.randn(8, 3), torch.zeros(8))


class CutMix(nn.Module):
    def forward(self, *rows: Any) -> Any:
        return rows


class Mixup:
    def __call__(self, *rows: Any) -> Any:
        return rows


def mixup_rows(rows: Any) -> Any:
    return default_collate(rows)


class Collate:
    def __init__(self, then: Any) -> None:
        self.then = then

    def __call__(self, rows: Any) -> Any:
        return self.then(*default_collate(rows))


class WithTransform(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3)


def closed_over(what: Any) -> Any:
    return lambda rows: what(*default_collate(rows))


HELD: dict[str, tuple[Any, Any]] = {
    "the function": (DATA, mixup_rows),
    "a partial": (DATA, functools.partial(mixup_rows)),
    "an object": (DATA, Mixup()),
    "in an attribute": (DATA, Collate(CutMix())),
    "in a list": (DATA, Collate([nn.Identity(), [Mixup()]])),
    "a module's part": (DATA, Collate(nn.Sequential(nn.Identity(), CutMix()))),
    "in a closure": (DATA, closed_over(CutMix())),
    "its bound method": (DATA, Mixup().__call__),
    "in the dataset": (WithTransform(nn.Sequential(CutMix())), None),
    "in a subset": (Subset(WithTransform(Mixup()), range(4)), None),
}


@pytest.mark.parametrize("held", HELD)
def test_it_is_found_wherever_it_is_held(held: str) -> None:
    with pytest.raises(ConfigurationError, match="several examples into one row"):
        refuse_mixed_records(*HELD[held])


def test_what_treats_examples_alone_passes() -> None:
    for dataset, collate in (
        (DATA, None),
        (DATA, Collate(nn.Dropout())),
        (WithTransform(nn.Identity()), default_collate),
    ):
        refuse_mixed_records(dataset, collate)
    refuse_mixed_records(list(range(10_000)), closed_over(torch.add))


def test_both_doors_look_and_leave_the_parts_usable() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = functools.partial(DataLoader, DATA, batch_size=4)
    given: dict[str, Any] = {"module": net, "optimizer": optimizer, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    with pytest.raises(ConfigurationError, match="collate_fn has a Mixup"):
        PrivacyEngine().make_private(data_loader=loader(collate_fn=Mixup()), **given)
    PrivacyEngine().make_private(data_loader=loader(), **given)
    other = nn.Linear(3, 2)
    step = PrivateStep(
        other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0)),
        loss_per_example=lambda m, b: m(b[0]).sum(1),
    )
    with pytest.raises(ConfigurationError, match="collate_fn has a mixup_rows"):
        step.batches(DATA, collate_fn=mixup_rows)
    step.batches(DATA)
