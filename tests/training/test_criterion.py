"""A criterion evaluated one example at a time: any reduction, any structure, or one clear error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import ConfigurationError
from privet.training.criterion import PrivateCriterion


def split(criterion: Any, *, reduction: Any = "mean", examples: int | None = None) -> PrivateCriterion:
    return PrivateCriterion(criterion, reduction=reduction, examples=lambda: examples)


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), (torch.randn(4, 5), torch.randint(5, (4,)))),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), (torch.randn(4, 5), torch.randint(5, (4,)))),
    "of tokens": (nn.CrossEntropyLoss(ignore_index=0), (torch.randn(4, 5, 3), torch.randint(1, 5, (4, 3)))),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), (torch.randn(4, 5), torch.randint(5, (4,)))),
    "not reduced": (nn.CrossEntropyLoss(reduction="none"), (torch.randn(4, 5), torch.randint(5, (4,)))),
    "weighted classes": (
        nn.CrossEntropyLoss(weight=torch.rand(5), reduction="sum"),
        (torch.randn(4, 5), torch.randint(5, (4,))),
    ),
    "negative likelihood": (nn.NLLLoss(), (torch.randn(4, 5), torch.randint(5, (4,)))),
    "binary": (nn.BCEWithLogitsLoss(), (torch.randn(4, 1), torch.rand(4, 1))),
    "square": (nn.MSELoss(), (torch.randn(4, 2, 3), torch.randn(4, 2, 3))),
    "absolute": (nn.L1Loss(), (torch.randn(4, 2), torch.randn(4, 2))),
    "triplet": (nn.TripletMarginLoss(), (torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3))),
    "ctc": (
        lambda o, y: F.ctc_loss(
            o.transpose(0, 1).log_softmax(2), y, torch.full((len(y),), 6), torch.full((len(y),), 2), reduction="sum"
        ),
        (torch.randn(4, 6, 5), torch.randint(1, 5, (4, 2))),
    ),
    "a variational bound": (
        lambda o, y: F.mse_loss(o[..., :2], y, reduction="sum") + 0.5 * (o[..., 2:].exp() - 1 - o[..., 2:]).sum(),
        (torch.randn(4, 4), torch.randn(4, 2)),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_each_loss_is_that_of_a_batch_of_one(case: str, reduction: str) -> None:
    criterion, arguments = CASES[case]
    expected = torch.stack([criterion(*(t[i : i + 1] for t in arguments)).sum() for i in range(4)])
    private = split(criterion, reduction=reduction)
    assert torch.allclose(private.per_example(*arguments), expected, atol=1e-6)
    whole = private(*arguments)
    assert whole.shape == ()
    assert torch.allclose(whole, expected.mean() if reduction == "mean" else expected.sum(), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_one_examples_labels_do_not_move_anothers_gradient(case: str) -> None:
    criterion, (first, *rest) = CASES[case]
    outputs = first.clone().requires_grad_(True)
    others = [t.clone() for t in rest]
    (before,) = torch.autograd.grad(split(criterion)(outputs, *others), outputs)
    for t in others:
        t[0] = t[1]
    with torch.no_grad():
        outputs[0] = 100.0
    (after,) = torch.autograd.grad(split(criterion)(outputs, *others), outputs)
    assert torch.equal(before[1:], after[1:])


def test_an_ordinary_token_average_would_have_moved_them() -> None:
    logits, labels = torch.randn(2, 5, 3, requires_grad=True), torch.randint(5, (2, 3))
    plain = nn.CrossEntropyLoss(ignore_index=-1)
    (before,) = torch.autograd.grad(plain(logits, labels), logits)
    labels[0, 1:] = -1
    (after,) = torch.autograd.grad(plain(logits, labels), logits)
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(
    "shapes",
    [((6, 5), (6,)), ((4, 5), (5,)), ((8, 5), (8,)), ()],
    ids=["another batch", "two sizes", "merged axes", "no tensor"],
)
def test_arguments_that_are_not_a_batch_are_refused(shapes: Any) -> None:
    tensors = [torch.zeros(s) for s in shapes]
    with pytest.raises(ConfigurationError, match="batch on axis 0"):
        split(lambda *a: torch.zeros(()), examples=4)(*tensors)


def test_a_criterion_that_needs_company_is_refused() -> None:
    def contrast(o: Tensor, y: Tensor) -> Tensor:
        if len(o) < 2:
            raise RuntimeError("needs two examples")
        return (o[0] - o[1]).square().sum()

    with pytest.raises(ConfigurationError, match="needs two examples"):
        split(contrast)(torch.randn(4, 2), torch.randn(4, 2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_has_a_loss_of_zero_that_can_be_differentiated(reduction: str) -> None:
    outputs = torch.zeros(0, 5, requires_grad=True)
    private = split(nn.CrossEntropyLoss(), reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = private(outputs, torch.zeros(0, dtype=torch.long))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert private.per_example(outputs, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_structures_keywords_and_numbers_pass_through() -> None:
    def criterion(o: dict[str, Tensor], y: Tensor, *, factor: float, names: str) -> Tensor:
        assert names == "n"
        return factor * F.mse_loss(o["a"], y) + o["b"].mean()

    o, y = {"a": torch.randn(4, 2), "b": torch.randn(4)}, torch.randn(4, 2)
    found = split(criterion).per_example(o, y, factor=2.0, names="n")
    assert torch.allclose(found, 2.0 * (o["a"] - y).square().mean(1) + o["b"])


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.rand(5)),
        nn.NLLLoss(weight=torch.rand(5)),
        nn.Sequential(nn.Identity(), nn.CrossEntropyLoss(weight=torch.rand(5))),
        lambda o, y: 2.0 * F.cross_entropy(o, y, weight=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])),
        lambda o, y: F.nll_loss(o.log_softmax(1), y, weight=torch.ones(5)) + o.square().mean(),
    ],
    ids=["module", "likelihood", "inside", "function", "one term"],
)
def test_a_mean_weighted_by_class_is_refused_with_the_line_to_write(criterion: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no effect.*reduction='sum'"):
        split(criterion)(torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,)))


def test_weights_that_are_not_divided_out_have_their_effect() -> None:
    weight, o, y = torch.tensor([1.0, 5.0]), torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    found = split(nn.CrossEntropyLoss(weight=weight, reduction="sum"))(o, y)
    assert torch.allclose(found, (weight[y] * F.cross_entropy(o, y, reduction="none")).mean())
