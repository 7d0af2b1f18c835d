from __future__ import annotations

import pytest
import torch
from torch import nn

from privet.errors import ConfigurationError, UnsupportedModelError
from privet.validation import find_mixing


class Centred(nn.Module):
    """Mixes its examples where no list of classes can see it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        h = self.linear(x)
        return h - h.mean(0)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        self.calls.add_(1)
        return self.linear(x)


def test_a_forward_that_mixes_examples_is_found():
    assert "output:" in find_mixing(Centred(), (torch.randn(5, 4),))[0]


def test_batch_normalisation_is_found_by_what_it_does():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    found = find_mixing(model, (torch.randn(5, 4),))
    assert any("output:" in each for each in found)
    assert any("running_mean" in each for each in found)
    assert not any("num_batches_tracked" in each for each in found)
    assert find_mixing(model.eval(), (torch.randn(5, 4),)) == []


def test_a_buffer_written_from_the_data_is_found_and_put_back():
    model = Remembering()
    assert find_mixing(model, (torch.arange(20.0).view(5, 4),)) == [
        "buffer largest: it is written from the data, without noise"
    ]
    assert model.largest == 0
    assert model.calls == 0


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 3),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.LayerNorm(4)),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3, batch_first=True)),
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_whose_examples_stay_apart_pass(model):
    shape = (5, 3, 4) if isinstance(model, nn.TransformerEncoderLayer) else (5, 4)
    assert find_mixing(model, (torch.randn(shape),)) == []


def test_tokens_keywords_and_nested_outputs_are_looked_at():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, *, tokens, scale):
            h = self.table(tokens["ids"]) * scale
            return {"apart": h, "mixed": [h.flip(0)], "count": 5}

    found = find_mixing(Model(), (), {"tokens": {"ids": torch.arange(15).view(5, 3) % 9}, "scale": 2.0})
    assert found == ["output['mixed'][0]: its row for one example depends on the other examples of the batch"]


def test_the_global_generator_and_the_gradients_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    find_mixing(model, (torch.ones(3, 4),))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_one_example_cannot_be_compared():
    with pytest.raises(ConfigurationError, match="at least 2, got 1"):
        find_mixing(nn.Linear(4, 3), (torch.randn(1, 4),))
    with pytest.raises(UnsupportedModelError, match=r"the arguments\[0\] is an int"):
        find_mixing(nn.Linear(4, 3), (3,))
