"""An operation that was never looked at, or whose layouts do not decide: the batch is looked at, nothing is guessed."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from privet import Flat
from privet.errors import PrivetError
from privet.gradients.capture.anew import Anew
from privet.gradients.reference import example_gradients
from tests.contracts.doors import DOORS, assert_exact, door_sum, expected_sum, explicit_sum, paper_sum, reference

D = 3
WAYS: dict[str, dict[str, Any]] = {
    "paper": {},
    "hooks": {"grad_sample_mode": "hooks"},
    "functorch": {"grad_sample_mode": "functorch"},
    "explicit": {},
    "two passes": {"passes": 2},
    "padded": {"physical_batch_size": 7, "padded": True},
    "physical": {"physical_batch_size": 3},
}


def way_sum(way: str, module: nn.Module, *batches: Any, loss: Any, policy: Any) -> dict[str, Tensor]:
    door = paper_sum if way in ("paper", "hooks", "functorch") else explicit_sum
    return door(module, *batches, loss=loss, policy=policy, **WAYS[way])


def squares(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
    return m(*b).square().flatten(1).sum(1)


class Late(nn.Module):
    """Sequence first inside: from a call on, one layer more, which sees (T, B, D)."""

    def __init__(self, since: int = 1) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = self.first(x).transpose(0, 1)
        if self.use:
            h = self.late(h.tanh())
        return self.last(h.transpose(0, 1).mean(1))


def switched(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch whose second tensor says whether the late layer takes part."""
    m.use = bool(b[1].any())
    return m(b[0]).square().sum(1)


def batch(n: int, t: int, *, late: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((n,), float(late))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("t", [5, 7])
def test_a_layer_met_late_with_as_many_positions_as_examples_is_looked_at(way: str, t: int) -> None:
    net = Late().double()
    second = batch(7, t, late=True, seed=1)
    found = way_sum(way, net, batch(6, t, late=False), second, second, loss=switched, policy=Flat(0.5))
    assert_exact(found, reference(net, second, switched, Flat(0.5)))


@pytest.fixture
def doubts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the doubts for which batches are looked at, as they come."""
    found: list[str] = []
    run = Anew.run

    def listed(self: Anew, inputs: Any, examples: int, doubt: Any, forward: Any) -> Any:
        found.append(str(doubt))
        return run(self, inputs, examples, doubt, forward)

    monkeypatch.setattr(Anew, "run", listed)
    return found


# -- programs that take turns ------------------------------------------------------------------------------------------


class Turns(nn.Module):
    """Skips layers at random, or takes turns: `how` says which layers see a batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers, self.last, self.how, self.calls = (
            nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
            nn.Linear(D, 2),
            how,
            0,
        )

    def chosen(self) -> list[nn.Module]:
        match self.how:
            case "stochastic depth":
                return [layer for layer in self.layers if torch.rand(()) < 0.5]
            case "two encoders":
                return [self.layers[self.calls % 2]]
            case "curriculum":
                return list(self.layers[: 1 + self.calls // 2])
        raise AssertionError(self.how)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D), positions first inside
        h = x.transpose(0, 1)
        for layer in self.chosen():
            h = h + layer(h).tanh()
        return self.last(h.mean(0))


def counted(m: Any, b: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch that says how often the model was called, and sets the seed of what it draws."""
    m.calls = int(b[1][0]) if len(b[1]) else 0
    torch.manual_seed(m.calls)
    return m(b[0]).square().sum(1)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", ["stochastic depth", "two encoders", "curriculum"])
def test_models_that_take_turns_train_and_are_exact(how: str, door: str) -> None:
    net = Turns(how).double()
    sizes = (4, 5, 1, 5, 2, 5, 5, 3)
    batches = [(batch(n, 5, late=False, seed=i)[0], torch.full((n,), i)) for i, n in enumerate(sizes)]
    for last in (1, 3, 5, len(batches) - 1):
        found = door_sum(door, net, *batches[: last + 1], loss=counted, policy=Flat(0.5))
        assert_exact(found, reference(net, batches[last], counted, Flat(0.5)))


def test_what_was_looked_at_once_is_not_looked_at_again(doubts: list[str]) -> None:
    net = Turns("two encoders").double()
    batches = [(batch(4, 3, late=False, seed=i)[0], torch.full((4,), i)) for i in range(12)]
    explicit_sum(net, *batches, loss=counted, policy=Flat(0.5))
    assert len(doubts) == 1
    assert "layers.1" in doubts[0]


def test_an_empty_batch_may_be_the_first_to_meet_a_layer() -> None:
    net = Turns("two encoders").double()
    batches = [(batch(n, 3, late=False, seed=i)[0], torch.full((n,), i)) for i, n in enumerate((2, 1, 0, 3))]
    for door in DOORS:
        found = door_sum(door, net, *batches, loss=counted, policy=Flat(0.5))
        assert_exact(found, reference(net, batches[-1], counted, Flat(0.5)))


# -- one layer, two layouts --------------------------------------------------------------------------------------------


class Both(nn.Module):
    """One layer sees examples first and positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).transpose(0, 1)).transpose(0, 1).mean(1)


@pytest.mark.parametrize("door", DOORS)
def test_two_layouts_of_a_layer_coincide_in_some_batches(door: str, doubts: list[str]) -> None:
    net = Both().double()
    batches = [(batch(n, t, late=False)[0],) for n, t in ((3, 4), (5, 4), (4, 4))]
    found = door_sum(door, net, *batches, loss=squares, policy=Flat(0.5))
    assert_exact(found, reference(net, batches[-1], squares, Flat(0.5)))
    assert len(doubts) == 1
    assert "leaves it open" in doubts[0]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.layer(x)
        scores = (h @ h.transpose(1, 2)).masked_fill(mask, float("-inf"))
        return self.last((scores.softmax(-1) @ h).mean(1))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 3, 4), (3, 4), (18, 18)], ids=str)
def test_a_mask_as_long_as_the_batch_holds_no_examples(sizes: tuple[int, ...], door: str) -> None:
    net, t = Masked().double(), max(sizes)
    mask = torch.ones(t, t, dtype=torch.bool).triu(1)
    batches = [(batch(n, t, late=False, seed=i)[0], mask) for i, n in enumerate(sizes)]
    found = door_sum(door, net, *batches, loss=squares, policy=Flat(0.5))
    rows = [(batches[-1][0][i : i + 1], mask) for i in range(sizes[-1])]
    assert_exact(found, expected_sum(example_gradients(net, rows, lambda m, b: squares(m, b).sum()), Flat(0.5)))


class Queries(nn.Module):
    """Learned queries repeated for each example, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.queries, self.last = nn.Linear(D, D), nn.Embedding(2, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).transpose(0, 1)
        q = self.queries.weight.unsqueeze(1).repeat(1, len(x), 1)
        scores = torch.einsum("qbd,tbd->bqt", q, h).softmax(-1)
        return self.last(torch.einsum("bqt,tbd->qbd", scores, h) + q).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("door", DOORS)
def test_queries_repeated_for_each_example(door: str, doubts: list[str]) -> None:
    net = Queries().double()
    batches = [(batch(n, t, late=False)[0],) for n, t in ((2, 5), (3, 2), (1, 4), (2, 2))]
    assert_exact(
        door_sum(door, net, *batches, loss=squares, policy=Flat(0.5)),
        reference(net, batches[-1], squares, Flat(0.5)),
    )
    assert not doubts


# -- what surrounds a forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_a_checkpointed_part_may_be_met_late(door: str) -> None:
    class Checkpointed(Late):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).transpose(0, 1)
            if self.use:
                h = checkpoint(lambda h: self.late(h.tanh()), h, use_reentrant=False)
            return self.last(h.transpose(0, 1).mean(1))

    net, second = Checkpointed().double(), batch(4, 4, late=True, seed=1)
    found = door_sum(door, net, batch(3, 4, late=False), second, loss=switched, policy=Flat(0.5))
    assert_exact(found, reference(net, second, switched, Flat(0.5)))


def test_two_forwards_that_share_a_backward_and_the_second_is_in_doubt() -> None:
    net = Late().double()

    def both(m: Any, b: tuple[Tensor, ...]) -> Tensor:
        m.use = False
        plain = m(b[0])
        m.use = bool(b[1].any())
        return (plain * m(b[0].roll(1, 1))).sum(1)

    batches = [batch(3, 4, late=False), batch(4, 4, late=True, seed=1)]
    assert_exact(paper_sum(net, *batches, loss=both, policy=Flat(0.5)), reference(net, batches[1], both, Flat(0.5)))


def test_hooks_of_the_user_act_once_on_a_forward_that_is_run_anew() -> None:
    net = Late().double()
    net.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    net.register_forward_hook(lambda module, args, output: output * 3.0)
    batches = [batch(3, 4, late=False), batch(4, 4, late=True, seed=1)]
    found = paper_sum(net, *batches, loss=switched, policy=Flat(0.5))
    assert_exact(found, reference(net, batches[1], switched, Flat(0.5)))


@pytest.mark.parametrize("door", DOORS)
def test_a_thread_that_the_forward_began_is_in_doubt_and_the_batch_is_looked_at(door: str) -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []

            def part() -> None:
                with torch.enable_grad():
                    found.append(self.layer(x))

            thread = threading.Thread(target=part)
            thread.start()
            thread.join()
            return found[0].mean(1)

    net, last = Threaded().double(), (batch(4, 3, late=False)[0],)
    with pytest.warns(UserWarning, match="a thread of its own"):
        found = door_sum(door, net, last, last, loss=squares, policy=Flat(0.5))
    assert_exact(found, reference(net, last, squares, Flat(0.5)))


class Outer(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupted_forward_leaves_the_users_modes_as_they_were(door: str) -> None:
    net = Late().double()

    def loss(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        if b[1].any():
            hook = m.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with contextlib.suppress(KeyboardInterrupt), Outer():
                m(b[0])
            hook.remove()
            assert not any(isinstance(mode, Outer) for mode in _get_current_function_mode_stack())
        with Outer() as outer:
            found = switched(m, b)
            assert _get_current_function_mode_stack()[-1] is outer
        return found

    batches = [batch(3, 4, late=False), batch(4, 4, late=True, seed=1)]
    found = door_sum(door, net, *batches, loss=loss, policy=Flat(0.5))
    assert _get_current_function_mode_stack() == []
    assert_exact(found, reference(net, batches[1], switched, Flat(0.5)))


@pytest.mark.parametrize("seed", range(6))
def test_layers_dropped_after_a_dropout_are_the_same_with_one_example_more(seed: int) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.last = nn.ModuleList(nn.Linear(D, D) for _ in range(4)), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = nn.functional.dropout(x, 0.3)
                if torch.rand(()) < 0.5:
                    x = layer(x).tanh()
            return self.last(x).mean(1)

    torch.manual_seed(seed)
    batches = [(batch(n, 3, late=False, seed=n)[0],) for n in (4, 5, 3, 4)]
    found = paper_sum(Dropping().double(), *batches, loss=squares, policy=Flat(0.5))
    assert all(t.isfinite().all() for t in found.values())


class Noted(nn.Module):
    """A parameter in place of some positions, chosen by a mask that Python made, as SpecAugment's are."""

    def __init__(self, *, moved: bool = False) -> None:
        super().__init__()
        self.layer, self.last, self.noted = nn.Linear(D, D), nn.Linear(D, 2), nn.Parameter(torch.randn(D))
        self.moved = moved

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        mask = torch.tensor([[position[0] > 0.0 for position in example] for example in x.tolist()])
        if self.moved:  # and put back below
            order = x[:, 0, 0].argsort()
            h, mask = h[order], mask[order]
        h[mask] = self.noted
        h = h[order.argsort()] if self.moved else h
        return self.last(h.tanh().mean(1))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("sizes", [(D, D), (4, 2, 5)], ids=str)
def test_a_mask_that_python_made_moves_no_row_of_what_it_is_written_to(
    sizes: tuple[int, ...], door: str, doubts: list[str]
) -> None:
    net = Noted().double()
    batches = [(batch(n, D, late=False, seed=i)[0],) for i, n in enumerate(sizes)]
    found = door_sum(door, net, *batches, loss=squares, policy=Flat(0.5))
    assert not doubts
    assert_exact(found, reference(net, batches[-1], squares, Flat(0.5)))


def test_rows_that_were_moved_are_in_doubt_under_any_mask(doubts: list[str]) -> None:
    def loss(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        m.moved = bool(b[1].any())
        return m(b[0]).square().sum(1)

    batches = [batch(n, D, late=n > 4, seed=n) for n in (4, 5)]
    with pytest.warns(UserWarning, match="rows were moved along the batch"), pytest.raises(PrivetError):
        explicit_sum(Noted().double(), *batches, loss=loss, policy=Flat(0.5))
    assert "__setitem__" in doubts[0]
