"""Batches filled up with examples of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from privet.batches.fill import fill_rows
from privet.errors import ConfigurationError


@dataclass
class Record:
    x: Tensor
    name: str


class Pair(NamedTuple):
    x: Tensor
    y: np.ndarray


def test_batches_of_every_form_are_filled_up_with_zeros():
    ids = torch.ones(2, 3, dtype=torch.int32)
    mask = torch.ones(2, dtype=torch.bool)
    filled = fill_rows({"ids": ids, "inner": [mask, (torch.tensor(2.0), "name", None)]}, 4, examples=2)
    assert torch.equal(filled["ids"], torch.cat([ids, torch.zeros(2, 3, dtype=torch.int32)]))
    assert filled["ids"].dtype == torch.int32
    assert filled["inner"][0].tolist() == [True, True, False, False]
    assert filled["inner"][1] == (torch.tensor(2.0), "name", None)
    record = fill_rows(Record(torch.ones(2, 1), "a"), 3, examples=2)
    assert record.x.tolist() == [[1.0], [1.0], [0.0]]
    pair = fill_rows(Pair(torch.ones(1), np.ones(1, dtype=np.float32)), 2, examples=1)
    assert pair.y.dtype == np.float32
    assert pair.y.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3), ["a", "b"]),
        (torch.ones(2, 3), [1, 2]),
        (torch.ones(2, 3), np.array(["a", "b"])),
    ],
    ids=["another length", "strings", "numbers", "array of strings"],
)
def test_what_cannot_be_filled_up_is_refused_by_its_place(batch):
    with pytest.raises(ConfigurationError, match=r"the batch\[1\]"):
        fill_rows(batch, 4, examples=2)
