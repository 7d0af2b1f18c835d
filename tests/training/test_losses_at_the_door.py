"""A user's own loss at the paper's door: what lets one example move others is refused, and nothing is released."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, PrivacyEngine
from privet.training.private_module import modes

pytestmark = [
    pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
]


class Door:
    def __init__(self, net: nn.Module | None = None, **options: Any) -> None:
        self.net = nn.Linear(3, 5) if net is None else net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.engine = PrivacyEngine(accountant="rdp")
        _, _, self.loader, *self.criterion = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(TensorDataset(torch.zeros(16, 3)), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options,
        )

    def step(self, loss: Callable[[Tensor], Tensor], examples: int = 4) -> None:
        self.optimizer.zero_grad()
        loss(self.net(torch.randn(examples, 3))).backward()
        self.optimizer.step()


def weighted(o: Tensor) -> Tensor:
    return F.cross_entropy(o, torch.tensor([0, 1, 2, 3]), weight=torch.rand(5))


@pytest.mark.parametrize("mode", modes())
def test_a_loss_that_is_refused_leaves_everything_as_it_was_and_the_next_one_trains(mode: str) -> None:
    door = Door(grad_sample_mode=mode)
    before = [p.clone() for p in door.net.parameters()]
    with pytest.raises(ConfigurationError, match=r"weighted by class.*criterion="):
        door.step(weighted)
    assert door.engine.ledger.steps == 0
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, door.net.parameters(), strict=True))
    door.step(lambda o: F.cross_entropy(o, torch.tensor([0, 1, 2, 3])))
    assert door.engine.ledger.steps == 1


def test_what_would_have_been_moved() -> None:
    """Shows that the refusal is needed: the weight of one example's class rescales the other's gradient."""
    o, weight = torch.randn(2, 5, requires_grad=True), torch.tensor([1.0, 1.0, 100.0, 1.0, 1.0])
    first, second = (torch.autograd.grad(F.cross_entropy(o, torch.tensor([0, y]), weight=weight), o)[0] for y in (1, 2))
    assert first[0].norm() > 40 * second[0].norm()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o: F.mse_loss(o[:, :1], torch.randn(4)), "broadcasting"),
        (lambda o: F.cross_entropy(o @ o.T, torch.arange(4)), "contrastive"),
        (lambda o: F.cross_entropy(o, torch.tensor([0, 1, 2, 3]), reduction="sum"), "loss_reduction='sum'"),
        (lambda o: F.cross_entropy(o, torch.tensor([0, -100, 2, -100])), "ignore_index"),
        (lambda o: F.cross_entropy(o, torch.tensor([0, 1, 2, 3]), ignore_index=0), "ignore_index"),
    ],
    ids=["broadcast", "contrastive", "sum", "labels left out by default", "labels left out"],
)
def test_losses_that_are_no_sum_over_examples_are_refused(loss: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s){words}.*Nothing was released"):
        Door().step(loss)


def test_a_mean_is_refused_where_a_sum_was_declared() -> None:
    door = Door(loss_reduction="sum")
    with pytest.raises(ConfigurationError, match="a sum was declared"):
        door.step(lambda o: o.square().mean())
    door.step(lambda o: o.square().sum())


class Tokens(nn.Module):
    """Logits of 6 tokens for each example, classes last."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[:, None].expand(-1, 6, -1) + torch.arange(6.0)[:, None])


@pytest.mark.parametrize("shifted", [False, True], ids=["all", "next token"])
def test_a_token_mean_is_refused_when_it_leaves_labels_out(shifted: bool) -> None:
    door = Door(Tokens())

    def loss(o: Tensor, *, ignored: int) -> Tensor:
        labels = torch.arange(24).view(4, 6) % 5
        labels[1, :ignored] = -100
        if shifted:
            o, labels = o[:, :-1], labels[:, 1:]
        return F.cross_entropy(o.reshape(-1, 5), labels.reshape(-1))

    door.step(lambda o: loss(o, ignored=0))  # as many tokens of each example: no example can change that
    with pytest.raises(ConfigurationError, match="tokens of all examples"):
        door.step(lambda o: loss(o, ignored=4))


def test_it_is_looked_for_again_and_again() -> None:
    door = Door()
    for _ in range(15):
        door.step(lambda o: o.square().mean())
    with pytest.raises(ConfigurationError, match="weighted by class"):
        door.step(weighted)


def test_a_criterion_that_was_given_has_to_be_used() -> None:
    door = Door(criterion=nn.CrossEntropyLoss())
    with pytest.raises(ConfigurationError, match=r"criterion= was given.*Call it on outputs and targets"):
        door.step(lambda o: F.cross_entropy(o, torch.tensor([0, 1, 2, 3])))
    (criterion,) = door.criterion
    for _ in range(2):
        door.step(lambda o: criterion(o, torch.tensor([0, 1, 2, 3])))
    door.step(lambda o: criterion.per_example(o, torch.tensor([0, 1, 2, 3])).mean())
    door.step(lambda o: criterion(o, torch.tensor([0, 1, 2, 3])) + 0.1 * o.square().mean())
    assert door.engine.ledger.steps == 4


def test_what_the_criterion_splits_may_be_anything() -> None:
    door = Door(criterion=lambda o, y: F.cross_entropy(o, y, ignore_index=0).sqrt())
    door.step(lambda o: door.criterion[0](o, torch.tensor([1, 1, 2, 3])))
    assert door.engine.ledger.steps == 1


def test_a_weighted_criterion_is_refused_before_anything_is_touched() -> None:
    net = nn.Linear(3, 5)
    with pytest.raises(ConfigurationError, match="weights would have no effect"):
        Door(net, criterion=nn.CrossEntropyLoss(weight=torch.rand(5)))
    Door(net)


def test_the_graph_is_let_go_of() -> None:
    import gc
    import weakref

    door = Door()
    gc.collect()
    gc.disable()
    try:
        inputs = torch.randn(4, 3, requires_grad=True)
        alive = weakref.ref(inputs)
        door.net(inputs).square().mean().backward()
        door.optimizer.step()
        del inputs
        assert alive() is None
    finally:
        gc.enable()
