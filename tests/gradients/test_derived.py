"""Tensors computed from parameters alone: gradients pulled back exactly, norms taken where they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.clipping import PerLayer
from privet.gradients.derived import is_isometry
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference
from tests.contracts.zoo import squares

WAYS: dict[str, Any] = {
    "transposed": lambda w, x: x @ w.t(),
    "transposed and straight": lambda w, x: (x @ w.t()) @ w,
    "viewed and back": lambda w, x: x @ w.view(-1).view(4, 4),
    "halves": lambda w, x: torch.cat([x @ part for part in w.chunk(2, dim=1)], dim=1),
    "overlapping slices": lambda w, x: (
        x @ w[:, :3] @ torch.ones(3, 4, dtype=w.dtype) + x @ w[:, 1:] @ torch.ones(3, 4, dtype=w.dtype)
    ),
    "one slice twice": lambda w, x: (x @ w[:, :2]).sin() @ w[:2],
    "halves of halves": lambda w, x: torch.cat([x @ q for h in w.chunk(2, 1) for q in h.chunk(2, 1)], dim=1),
    "half and whole": lambda w, x: x @ w.chunk(2, dim=1)[0] @ w[:2],
    "unbound": lambda w, x: torch.stack([x @ row for row in w.unbind(0)], dim=1),
    "scaled": lambda w, x: x @ (2.0 * w),
    "summed": lambda w, x: x * w.sum(0),
    "a scalar": lambda w, x: x * w.mean(),
    "normalised": lambda w, x: x @ F.normalize(w, dim=0),
    "inverted": lambda w, x: x @ torch.linalg.inv(w + 5 * torch.eye(4, dtype=w.dtype)),
    "with itself": lambda w, x: x @ (w @ w),
    "softmaxed": lambda w, x: x @ w.softmax(0),
    "indexed": lambda w, x: x @ w[[0, 0, 1, 3]],
    "diagonal": lambda w, x: x * w.diagonal(),
    "lower": lambda w, x: x @ w.tril(),
    "flipped": lambda w, x: x @ w.flip(0),
    "einsum": lambda w, x: torch.einsum("bi,io->bo", x, w),
    "from the left": lambda w, x: (w @ x.unsqueeze(2)).squeeze(2),
    "expanded for a bmm": lambda w, x: torch.bmm(x.unsqueeze(1), w.unsqueeze(0).expand(len(x), 4, 4)).squeeze(1),
    "baddbmm": lambda w, x: torch.baddbmm(
        w[:1].expand(len(x), 1, 4), x.unsqueeze(1), x.unsqueeze(2) * x.unsqueeze(1)
    ).squeeze(1),
    "bilinear": lambda w, x: torch.einsum("bi,ij,bj->b", x, w, x).unsqueeze(1),
    "where": lambda w, x: torch.where(x > 0, x * w[0], w[1]),
    "power": lambda w, x: (x.abs() + 1.0) ** w[0],
    "lerp": lambda w, x: torch.lerp(x, x.square(), w[0]),
    "distance": lambda w, x: torch.cdist(x, w),
    "in place": lambda w, x: x.clone().mul_(w[0]).add_(w[1]),
    "prelu": lambda w, x: F.prelu(x, w[0]),
    "clamped": lambda w, x: torch.maximum(x, w[0]),
}


class Uses(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.last = nn.Linear(4, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        used = WAYS[self.way](self.w, x).sin()
        return self.last(x + used) if used.shape[1:] == (4,) else used.flatten(1) * self.last(x).sum(1, keepdim=True)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_from_a_parameter_to_the_data_is_exact(way: str, door: str) -> None:
    torch.manual_seed(0)
    model, batch = Uses(way).double(), (torch.randn(5, 4, dtype=torch.float64),)
    for policy in (Flat(0.5), PerLayer(0.5)):
        expected = reference(model, batch, lambda m, b: squares(m(*b)), policy)
        assert_exact(door_sum(door, model, batch, loss=lambda m, b: squares(m(*b)), policy=policy), expected)


@pytest.mark.filterwarnings("ignore:the clip norm is", "ignore:the noise multiplier is")
@pytest.mark.parametrize("way", ["summed", "a scalar", "expanded for a bmm", "scaled"])
def test_noise_of_a_pulled_back_sum_is_drawn_for_every_entry(way: str) -> None:
    from privet import Gaussian, Mechanism, Poisson, PrivateStep
    from tests.contracts.doors import taken

    model = Uses(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=Flat(1e-6), noise=Gaussian(1e6)),
        loss_per_example=lambda m, b: squares(m(*b)),
        expected_batch_size=1.0,
    )
    seen = taken(model, optimizer)
    with pytest.warns(UserWarning, match="did not come"):
        step((torch.randn(5, 4),))
    assert len(seen[-1]["w"].flatten().unique()) == 16


def test_only_moves_of_entries_keep_norms() -> None:
    w = torch.randn(4, 4)
    assert is_isometry(Tensor.t, (w,))
    assert is_isometry(Tensor.__getitem__, (w, (slice(1, 3), None, 0)))
    assert not is_isometry(Tensor.__getitem__, (w, torch.tensor([0, 0])))
    assert not is_isometry(Tensor.__getitem__, (w, [0, 0]))
    assert not is_isometry(Tensor.expand, (w, 2, 4, 4))
    assert not is_isometry(Tensor.mul, (w, 2))
