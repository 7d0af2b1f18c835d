"""Physical batches: which part of a logical one each is, and how sizes are halved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from privet.errors import ConfigurationError, OutOfMemoryError
from privet.noise import NoiseKey
from privet.sampling import BatchTicket, privatize_loader
from privet.sampling.physical import PhysicalSize, tickets_of

# -- tickets ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), most=st.integers(1, 45), first=st.booleans(), last=st.booleans())
def test_tickets_of_parts_add_up(size: int, most: int, first: bool, last: bool) -> None:
    whole = BatchTicket(step=3, index=2, passes=1, size=size, first=first, last=last)
    parts = list(tickets_of(whole, most))
    assert [stop - start for start, stop, _ in parts] == [ticket.size for *_, ticket in parts]
    assert sum(ticket.size for *_, ticket in parts) == size
    assert max(ticket.size for *_, ticket in parts) <= most
    assert [ticket.first for *_, ticket in parts] == [first] + [False] * (len(parts) - 1)
    assert [ticket.last for *_, ticket in parts] == [False] * (len(parts) - 1) + [last]
    assert {(ticket.step, ticket.index, ticket.passes) for *_, ticket in parts} == {(3, 2, 1)}


# -- drawing in parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_the_batches_cut(poisson: bool, workers: int) -> None:
    def loader(count: int) -> Any:
        data = DataLoader(TensorDataset(torch.arange(30)), batch_size=7, num_workers=count)
        key = NoiseKey.from_generator(torch.Generator().manual_seed(0))
        return privatize_loader(data, poisson=poisson, key=key)

    whole = [batch.tolist() for (batch,) in loader(0)]
    cut = loader(workers)
    parts = [(ticket, batch[0].tolist()) for ticket, batch in cut.drawn(lambda: 3)]
    joined: list[list[int]] = []
    for ticket, rows in parts:
        assert ticket.size == len(rows) <= 3
        if ticket.first:
            joined.append([])
        joined[-1] += rows
        assert ticket.last == (joined[-1] == whole[ticket.index])
    assert joined == whole


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_halved_down_to_one() -> None:
    size, error = PhysicalSize("size", "auto"), MemoryError("full")
    assert size.most is None
    for failed, expected in ((11, 5), (5, 2), (2, 1)):
        size.halve(failed, error)
        assert size.most == expected
    with pytest.raises(OutOfMemoryError, match="of 1, after 11, 5, 2, 1 were tried") as caught:
        size.halve(1, error)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("given", [0, -3, 2.0, "many", True, float("nan")])
def test_sizes_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="size must be a whole number of at least 1"):
        PhysicalSize("size", given)
