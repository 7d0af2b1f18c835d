"""What a forward and its backward share: the sink that is handed in, and a cycle that is over."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import ProtocolError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.derived import Derivation
from privet.gradients.rules import registry
from privet.gradients.use import Recorded, Use


class Listing:
    """A sink that writes down what it hears."""

    def __init__(self, capture: Capture) -> None:
        self.heard: list[Any] = []
        self.capture = capture

    def put(self, target: str | Derivation, use: Use) -> None:
        self.heard.append((target, use.rows))

    def done(self) -> None:
        self.heard.append(("done", self.capture.cycle, self.capture.watching))


def watched() -> tuple[nn.Module, Capture]:
    net = nn.Linear(3, 2)
    capture = Capture(dict(net.named_parameters()))
    learn_layouts(capture, lambda x: [net(x)], torch.randn(4, 3), examples=4)
    return net, capture


def test_a_sink_gets_every_use_and_then_hears_that_nothing_is_watched_any_more() -> None:
    net, capture = watched()
    sink = Listing(capture)
    capture.begin(4, sink)
    out = net(torch.randn(4, 3))
    capture.end([out])
    out.sum().backward()
    assert sorted(sink.heard[:-1]) == [("bias", 4), ("weight", 4)]
    assert sink.heard[-1] == ("done", None, False)
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())


def test_several_backwards_of_one_forward_go_to_a_sink_each() -> None:
    net, capture = watched()
    first, second = Listing(capture), Listing(capture)
    capture.begin(4, first, last=False)
    out = net(torch.randn(4, 3))
    capture.end([out])
    out.sum().backward(retain_graph=True)
    assert capture.cycle is not None
    capture.turn_to(second, last=True)
    out.sum().backward()
    assert len(first.heard) == len(second.heard) == 3
    assert capture.cycle is None


def test_a_backward_without_any_use_is_heard_of() -> None:
    net, capture = watched()
    sink, x = Listing(capture), torch.randn(4, 3, requires_grad=True)
    capture.begin(4, sink)
    net(x)
    out = x * 2
    capture.end([out])
    out.sum().backward()
    assert [heard[0] for heard in sink.heard] == ["done"]


def test_a_backward_through_an_earlier_forward_is_refused_and_the_new_one_goes_on() -> None:
    net, capture = watched()
    old, new = Recorded(examples=4), Recorded(examples=5)
    capture.begin(4, old)
    late = net(torch.randn(4, 3))
    capture.end([late])
    capture.begin(5, new)
    out = net(torch.randn(5, 3))
    capture.end([out])
    with pytest.raises(ProtocolError, match="ran again, or late"):
        late.sum().backward()
    out.sum().backward()
    assert not old.direct
    assert {name: uses[0].rows for name, uses in new.direct.items()} == {"weight": 5, "bias": 5}


def test_a_sink_is_not_handed_what_a_hook_gave_up() -> None:
    net, capture = watched()
    sink = Listing(capture)
    capture.begin(4, sink)
    x = torch.randn(4, 3, requires_grad=True)
    out = net(x)
    capture.end([out])
    x.register_hook(lambda gradient: capture.release())
    out.sum().backward()
    assert "done" not in [heard[0] for heard in sink.heard]


def test_an_abandoned_forward_frees_its_graph_and_what_was_recorded() -> None:
    net, capture = watched()
    recorded = Recorded(examples=4)
    capture.begin(4, recorded)
    middle = torch.randn(4, 3).requires_grad_().tanh()
    out = net(middle)
    capture.end([out])
    kept, graph = weakref.ref(recorded), weakref.ref(out)

    def interrupt(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    middle.register_hook(interrupt)  # the uses are recorded by then, and hold the graph
    with pytest.raises(KeyboardInterrupt):
        out.sum().backward()
    assert recorded.direct
    capture.release()
    del recorded, out, middle
    gc.collect()
    assert kept() is None
    assert graph() is None


def test_handlers_of_two_threads_do_not_see_each_others_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    net, capture = watched()
    capture.tell(learn_layouts(capture, lambda x: [net(x) + net(x)], torch.randn(4, 3), examples=4))
    first_is_inside, second_is_inside, first_is_done = (threading.Event() for _ in range(3))
    real = registry._HANDLERS[F.linear]

    def handler(call: registry.Call, *rest: Any) -> Any:
        if threading.current_thread() is first:
            first_is_inside.set()
            assert second_is_inside.wait(30)
        else:
            assert first_is_inside.wait(30)
            second_is_inside.set()
            assert first_is_done.wait(30)
        return real(call, *rest)

    monkeypatch.setitem(registry._HANDLERS, F.linear, handler)
    results: dict[str, Tensor] = {}

    def forward(name: str) -> None:
        with torch.enable_grad():
            results[name] = net(torch.randn(4, 3))
        if name == "first":
            first_is_done.set()

    first, second = (threading.Thread(target=forward, args=(name,)) for name in ("first", "second"))
    recorded = Recorded(examples=4)
    capture.begin(4, recorded)
    first.start()
    second.start()
    first.join(60)
    second.join(60)
    capture.end(results.values())
    assert set(results) == {"first", "second"}
    sum(results.values()).sum().backward()
    assert {name: len(uses) for name, uses in recorded.direct.items()} == {"weight": 2, "bias": 2}
