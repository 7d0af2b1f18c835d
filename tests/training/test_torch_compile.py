"""torch.compile around private training: before it is made private, and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contracts.doors import distance, loader, reference, taken
from torch import Tensor, nn

from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep
from privet.errors import CoverageError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EAGERLY = "Private training runs it eagerly"
Compile = Callable[[nn.Module, Any], nn.Module]


class Backend:
    """Compiles nothing, and counts what it was asked to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch.compiler.set_stance("default")  # a test before may have left a private forward in its middle
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def wrapped(module: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(module, backend=backend)  # type: ignore[return-value]


def in_place(module: nn.Module, backend: Any) -> nn.Module:
    module.compile(backend=backend)
    return module


def in_part(module: nn.Module, backend: Any) -> nn.Module:
    module[0] = torch.compile(module[0], backend=backend)  # type: ignore[operator]
    return module


def per_example(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch[0])
    return out.square().sum(1)


class Paper:
    """A module that was made private at the paper's door, without noise."""

    def __init__(self, module: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        self.engine = PrivacyEngine(accountant="rdp")
        self.module, *_ = self.engine.make_private(
            module=module, optimizer=self.optimizer, data_loader=loader(), noise_multiplier=0.0, max_grad_norm=0.5,
            loss_reduction="sum",
        )  # fmt: skip
        self.seen = taken(module, self.optimizer)

    def train(self, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        call(X).square().sum().backward()
        self.optimizer.step()
        return self.seen[-1]


def explicit(module: nn.Module, *, loss: Any = per_example, **options: Any) -> tuple[PrivateStep, list[Any]]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=Flat(0.5), noise=Gaussian(0.0))
    step = PrivateStep(
        module, optimizer=optimizer, mechanism=mechanism, loss_per_example=loss, expected_batch_size=1.0,
        performance=Performance(**options),
    )  # fmt: skip
    return step, taken(module, optimizer)


def expected() -> dict[str, Tensor]:
    return reference(net(), (X,), per_example, Flat(0.5))


def apart(found: dict[str, Tensor]) -> float:
    """Returns the distance from one example at a time, whatever the names of a wrapped module are."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    return distance(plain, expected())


@pytest.mark.parametrize("compiled", [wrapped, in_place, in_part])
def test_a_compiled_model_trains_eagerly_with_a_warning(compiled: Compile, backend: Backend) -> None:
    module = compiled(net(), backend)
    with pytest.warns(UserWarning, match=rf"torch\.compile was called.*{EAGERLY}.*Performance\(compile=True\)"):
        run = Paper(module)
    assert run.module is module
    assert apart(run.train(run.module)) < 1e-9
    assert backend.graphs == 0, "the check or the forward was compiled"
    with torch.no_grad():
        torch.testing.assert_close(run.module(X), net()(X))
    assert backend.graphs == (0 if compiled is in_place else 1)
    assert apart(run.train(run.module)) < 1e-9  # compiled code that is there already is not used


@pytest.mark.parametrize("compiled", [wrapped, in_place, in_part])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_compiled_model_takes_eager_steps(compiled: Compile, passes: int, backend: Backend) -> None:
    with pytest.warns(UserWarning, match=EAGERLY):
        step, seen = explicit(compiled(net(), backend), passes=passes)
    step((X,))
    assert apart(seen[-1]) < 1e-9
    assert backend.graphs == 0


def test_a_compiled_loss_is_evaluated_eagerly(backend: Backend) -> None:
    with pytest.warns(UserWarning, match=rf"called on the loss\. {EAGERLY}"):
        step, seen = explicit(net(), loss=torch.compile(per_example, backend=backend))
    step((X,))
    assert apart(seen[-1]) < 1e-9
    assert backend.graphs == 0


def test_a_model_that_is_compiled_in_place_after_its_step_was_made_is_said_so_once(backend: Backend) -> None:
    step, seen = explicit(net())
    step.model.compile(backend=backend)
    with pytest.warns(UserWarning, match=EAGERLY):
        step((X,))
    step((X,))
    assert apart(seen[-1]) < 1e-9
    assert backend.graphs == 0


# -- afterwards --------------------------------------------------------------------------------------------------------

AFTERWARDS: dict[str, Callable[[nn.Module, Any], Callable[[Tensor], Tensor]]] = {
    "the model": wrapped,
    "the model in place": in_place,
    "a function around it": lambda module, backend: torch.compile(lambda x: module(x) * 1.0, backend=backend),
}


@pytest.mark.parametrize("which", AFTERWARDS)
def test_training_a_private_model_that_was_compiled_is_refused_at_once(which: str, backend: Backend) -> None:
    run = Paper(net())
    compiled = AFTERWARDS[which](run.module, backend)
    with pytest.raises(UnsupportedModelError, match=r"called on a private model.*PrivateStep.*compile=True"):
        run.train(compiled)
    assert run.engine.ledger.steps == 0
    assert all(p.grad is None for p in run.module.parameters())
    run.module._compiled_call_impl = None
    assert apart(run.train(run.module)) < 1e-9


@pytest.mark.parametrize("which", AFTERWARDS)
def test_a_private_model_may_be_compiled_to_be_evaluated(which: str, backend: Backend) -> None:
    run = Paper(net())
    compiled = AFTERWARDS[which](run.module, backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), net()(X))
    run.module.eval()
    torch.testing.assert_close(compiled(X), net()(X))
    assert backend.graphs > 0


def test_a_copy_of_a_private_model_is_refused_under_a_trace_too(backend: Backend) -> None:
    twin = copy.deepcopy(Paper(net()).module)
    with pytest.raises(UnsupportedModelError, match="called on a private model"):
        wrapped(twin, backend)(X)


def test_a_step_that_is_compiled_is_refused(backend: Backend) -> None:
    step, _ = explicit(net())
    compiled = torch.compile(step, backend=backend)
    with pytest.raises(UnsupportedModelError, match="called on a private model, or on a function that trains it"):
        compiled((X,))
    assert step.ledger.steps == 0


def test_hooks_that_do_nothing_under_a_trace_would_still_release_nothing(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """A planted bug: without the refusal nothing is captured, and the gradients run into the tripwires."""
    monkeypatch.setattr("privet.gradients.capture.hook.refuse_compiled", lambda *, trains: None)
    run = Paper(net())
    with pytest.raises(CoverageError, match="not captured per example"):
        run.train(wrapped(run.module, backend))
    assert run.engine.ledger.steps == 0


@pytest.mark.deep
@pytest.mark.parametrize("compiled", [wrapped, in_part])
def test_a_compiled_model_is_compiled_once_as_a_part_of_the_whole_step(compiled: Compile) -> None:
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=EAGERLY):
        step, seen = explicit(compiled(net(), "inductor"), compile=True, physical_batch_size=4)
    step((X,))
    assert apart(seen[-1]) < 1e-9
