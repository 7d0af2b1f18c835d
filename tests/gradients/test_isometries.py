"""What is said to keep a gradient's norm does keep it, and what does not is not said to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.isometries import INDEX_SELECT, is_isometry
from privet.gradients.tracing import traced

C = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
ONCE, TWICE = torch.tensor([3, 0, -2]), torch.tensor([1, 2, -3])
Call = tuple[Callable[..., Any], Callable[[Tensor], tuple[Any, ...]], dict[str, Any]]
KEPT: dict[str, Call] = {
    "t": (Tensor.t, lambda w: (w,), {}),
    "slice": (Tensor.__getitem__, lambda w: (w, (slice(1, 3), None, 0)), {}),
    "1 + w": (Tensor.__radd__, lambda w: (w, 1.0), {}),
    "1 - w": (Tensor.__rsub__, lambda w: (w, 1.0), {}),
    "w - c": (torch.sub, lambda w: (w, C), {}),
    "places": (Tensor.__getitem__, lambda w: (w, ONCE), {}),
    "places in a tuple": (Tensor.__getitem__, lambda w: (w, (ONCE.view(1, 3),)), {}),
    "index_select": (INDEX_SELECT, lambda w: (w, 1, ONCE % 4), {}),
    "embedding": (F.embedding, lambda w: (ONCE % 4, w), {}),
    "embedding, all said": (F.embedding, lambda w: (ONCE % 4, w, None, None, 2.0, False, False), {}),
    "embedding, as the module asks": (F.embedding, lambda w: (ONCE % 4, w), {"padding_idx": None, "sparse": False}),
    "embedding by name": (F.embedding, lambda w: (), {"input": ONCE % 4}),
}
NOT: dict[str, Call] = {
    "a place twice": (Tensor.__getitem__, lambda w: (w, torch.tensor([0, 0])), {}),
    "a place twice, from either end": (Tensor.__getitem__, lambda w: (w, TWICE), {}),
    "a list": (Tensor.__getitem__, lambda w: (w, [0, 0]), {}),
    "two places": (Tensor.__getitem__, lambda w: (w, (ONCE, ONCE)), {}),
    "more places than entries": (F.embedding, lambda w: (torch.arange(5) % 4, w), {}),
    "embedding, padded": (F.embedding, lambda w: (ONCE % 4, w, 0), {}),
    "embedding, padded by name": (F.embedding, lambda w: (ONCE % 4, w), {"padding_idx": 0}),
    "index_select twice": (torch.index_select, lambda w: (w, 0, TWICE % 4), {}),
    "expand": (Tensor.expand, lambda w: (w, 2, 4, 4), {}),
    "scaled": (Tensor.mul, lambda w: (w, 2), {}),
    "scaled while added": (torch.add, lambda w: (C, w), {"alpha": 2}),
    "spread": (torch.add, lambda w: (w, torch.zeros(2, 1, 1)), {}),
    "of another type": (torch.add, lambda w: (w.float(), C), {}),
}


def norms(call: Call) -> tuple[bool, float, float]:
    """Returns what is said, and the norms of a gradient of the result and of the parameter."""
    function, arguments, kwargs = call
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    args = arguments(w)
    kwargs = kwargs if args else {**kwargs, "weight": w}
    result = function(*args, **kwargs)
    gradient = torch.randn_like(result)
    (back,) = torch.autograd.grad(result, [w], gradient)
    root = next((a for a in args if isinstance(a, Tensor) and a.requires_grad), w)
    return is_isometry(function, root, args, kwargs, result), float(gradient.norm()), float(back.norm())


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_norms_is_known(name: str) -> None:
    said, before, after = norms(KEPT[name])
    assert said
    assert after == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("name", NOT)
def test_what_may_change_norms_is_not_said_to_keep_them(name: str) -> None:
    assert not norms(NOT[name])[0]


def test_a_traced_graph_does_not_look_at_places() -> None:
    w = torch.randn(4, 4)
    with traced():
        assert not is_isometry(Tensor.__getitem__, w, (w, ONCE), {}, w[ONCE])


def test_a_library_may_put_its_own_index_select_in_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(*args: Any) -> Tensor:  # as PyTorch Geometric has it
        found: Tensor = INDEX_SELECT(*args)
        return found

    monkeypatch.setattr(torch, "index_select", another)
    said, before, after = norms(KEPT["index_select"])
    assert said
    assert after == pytest.approx(before, rel=1e-12)
