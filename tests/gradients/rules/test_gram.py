"""Norms by Gram matrices: never too small, and found again where the bound on their rounding error is wide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from privet.gradients.rules.gram import gram_padding, never_too_small

PADDING = gram_padding(64, torch.float32, torch.device("cpu"))


FOUND_AGAIN = 77.0


def again(rows: Tensor) -> Tensor:
    return torch.full((len(rows),), FOUND_AGAIN)


def bounded(gram: Tensor, scale: Tensor) -> Tensor:
    """Returns the norms for given sizes of the terms: those of one position with both vectors of equal length."""
    length = scale.sqrt().sqrt().unsqueeze(1)
    return never_too_small(gram, (length, length), (3, 64), terms=64, again=again)


def test_a_narrow_bound_is_added():
    gram, scale = torch.tensor([4.0, 9.0]), torch.tensor([4.0, 10.0])
    norms = bounded(gram, scale)
    assert torch.allclose(norms - gram, scale * PADDING, rtol=1e-1)
    assert (norms > gram).all()


def test_a_norm_that_rounding_made_negative_is_found_again_and_no_other():
    norms = bounded(torch.tensor([4.0, -1e-9, 9.0]), torch.tensor([4.0, 4.0, 9.0]))
    assert norms[1] == FOUND_AGAIN
    assert torch.equal(norms[[0, 2]], bounded(torch.tensor([4.0, 9.0]), torch.tensor([4.0, 9.0])))


@pytest.mark.parametrize(("share", "narrow"), [(0.5, True), (2.0, False)])
def test_where_a_bound_stops_being_narrow(share, narrow):
    scale = torch.tensor([1.0, 1.0])
    gram = torch.tensor([1.0, PADDING / (share * 2e-4)])
    norms = bounded(gram, scale)
    assert norms[0] != FOUND_AGAIN
    assert (norms[1] != FOUND_AGAIN) == narrow


@pytest.mark.parametrize(
    "row", [(0.0, 0.0), (float("nan"), 1.0), (float("inf"), float("inf")), (1.0, float("inf"))]
)  # of the Gram matrices, and of the sizes
def test_rows_of_zeros_and_rows_that_are_dropped_later_are_not_found_again(row):
    gram, scale = torch.tensor([4.0, row[0]]), torch.tensor([4.0, row[1]])
    norms = bounded(gram, scale)
    assert float(norms[0]) > 4.0
    assert 0.0 < float(norms[1]) < 1e-20 if row == (0.0, 0.0) else not norms[1].isfinite()


@pytest.mark.parametrize("size", [1e6, 1e19])
def test_what_underflow_took_is_added_or_the_norm_found_again(size):
    """Each square of the first vector is zero, and hides what the second makes as large as it is itself."""
    first, second = torch.full((1, 2, 3), 2.6e-23), torch.full((1, 2, 1), size)
    gram = (torch.bmm(first, first.mT) * torch.bmm(second, second.mT)).flatten(1).sum(1)
    lengths = torch.linalg.vector_norm(first, dim=2), torch.linalg.vector_norm(second, dim=2)
    assert float(gram) == 0.0
    norms = never_too_small(gram, lengths, (3, 1), terms=3, again=again)
    if size == 1e19:
        assert float(norms) == FOUND_AGAIN
    else:
        assert float(norms) >= float((second.double().mT @ first.double()).square().sum()) > 0.0
