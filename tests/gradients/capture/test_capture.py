"""Every way to use a parameter, by both doors, against one backward for each example."""

from __future__ import annotations

import pytest
import torch

from privet import Flat
from privet.clipping import PerLayer
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference
from tests.contracts.zoo import ZOO, batch_of, model_of, plain


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ZOO)
def test_the_sum_is_that_of_one_backward_for_each_example(name: str, door: str) -> None:
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    for policy in (Flat(0.7), PerLayer(0.7)):
        expected = reference(plain(model), batch, loss, policy)
        assert_exact(door_sum(door, model, batch, loss=loss, policy=policy), expected)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 3), (3, 4), (1, 4), (1, 1), (0, 4), (2, 0, 1)], ids=str)
def test_the_batch_axis_is_never_guessed_from_a_coincidence(name: str, sizes: tuple[int, ...]) -> None:
    model, loss = model_of(name), ZOO[name].loss
    batches = [batch_of(name, n, seed=i) for i, n in enumerate(sizes)]
    expected = reference(plain(model), batches[-1], loss, Flat(0.7))
    assert_exact(door_sum("paper", model, *batches, loss=loss, policy=Flat(0.7)), expected)


@pytest.mark.parametrize("name", ZOO)
def test_float32_is_near(name: str) -> None:
    model, loss = model_of(name), ZOO[name].loss
    batch = batch_of(name, 5)
    expected = reference(plain(model), batch, loss, Flat(0.7))
    narrow = batch_of(name, 5, dtype=torch.float32)
    assert_exact(door_sum("explicit", model_of(name, torch.float32), narrow, loss=loss, policy=Flat(0.7)), expected)
