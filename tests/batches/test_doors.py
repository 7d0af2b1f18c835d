"""A real step gives the same clipped sum whatever container its batch is, at both doors and in every kind of step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import BatchMemoryManager, Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep
from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.passes.compiled import step_graph
from tests.batches.containers import FORMS, Form, T, examples_of
from tests.contracts.doors import assert_exact, distance, loader, reference, size, taken

B = 20
"""More than the check on the first batch looks at, so that it cuts the batch."""
POLICY = Flat(0.3)
EACH = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch")


SIZES: list[int] = []  # of the batches of the model that was made last; what a model keeps itself is put back


class Net(nn.Module):
    """A model of batches of one form: it finds x in its input by itself."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(T, 4).double(), nn.Linear(4, 3).double()
        self._form = form
        SIZES.clear()

    def forward(self, batch: Any) -> Tensor:
        x = self._form.x_of(batch)
        SIZES.append(len(x))
        found: Tensor = self.last(torch.tanh(self.first(x)))
        return found


def loss_of(form: Form) -> Callable[[nn.Module, Any], Tensor]:
    return lambda m, b: F.cross_entropy(m(b), form.y_of(b), reduction="none")


def expected_sum() -> Any:
    """Returns the sum for a tuple, by one backward for each example."""
    form = FORMS["tuple"]
    return reference(Net(form), examples_of(B), loss_of(form), POLICY)


def explicit(
    form: Form, *, expected: float | None = 1, noise_generator: Any = None, **options: Any
) -> tuple[PrivateStep, list[dict[str, Tensor]]]:
    net = Net(form)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=POLICY, noise=Gaussian(0.0), steps=12),
        loss_per_example=loss_of(form),
        expected_batch_size=expected,
        noise_generator=noise_generator,
        performance=Performance(**options),
    )
    return step, taken(net, step.optimizer)


def paper(form: Form, data: DataLoader[Any], **options: Any) -> tuple[Net, Any, Any, list[dict[str, Tensor]]]:
    net = Net(form)
    module, optimizer, private, *_ = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=POLICY.clip_norm,
        loss_reduction="sum",
        **options,
    )
    return module, optimizer, private, taken(module, optimizer)


# -- a batch of one's own ----------------------------------------------------------------------------------------------

STEPS: dict[str, dict[str, Any]] = {
    "whole": {},
    "two passes": {"passes": 2},
    "physical": {"physical_batch_size": 7},
    "padded": {"physical_batch_size": 24, "padded": True},
    "physical and padded": {"physical_batch_size": 6, "padded": True},
    "compiled": {"physical_batch_size": 24, "compile": True},
}


@EACH
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_at_the_explicit_door(form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph.torch, "compile", lambda graph, **_: graph)  # as it was traced
    row = FORMS[form]
    step, seen = explicit(row, **STEPS[kind])
    batch = row.make(*examples_of(B))
    if not row.fills and ("padded" in kind or kind == "compiled"):
        with pytest.raises(ConfigurationError, match=r"the batch\['names'\].*cannot be filled up"):
            step(batch)
        return
    if kind == "compiled" and not row.graph:
        with pytest.raises(ConfigurationError, match=r"the batch\['x'\] is of type \w+, which cannot be an input"):
            step(batch)
        return
    losses = step(batch)
    assert losses.shape == (B,)
    assert_exact(seen[-1], expected_sum())
    assert size(seen[-1]) > 0
    again = step(row.make(*examples_of(B)))
    assert torch.allclose(again, losses)
    assert_exact(seen[-1], expected_sum())


@EACH
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_step_at_the_papers_door(form: str, how: str) -> None:
    row = FORMS[form]
    module, optimizer, _, seen = paper(row, loader())
    batch = row.make(*examples_of(B))
    outputs = module(batch) if how == "positional" else module(batch=batch)
    F.cross_entropy(outputs, row.y_of(batch), reduction="sum").backward()
    optimizer.step()
    sizes = list(SIZES)  # before another model is made
    assert_exact(seen[-1], expected_sum())
    assert 17 in sizes, "the check asked for one example more than the 16 that it looks at"


@pytest.mark.parametrize("form", [form for form, row in FORMS.items() if row.graph and row.fills])
def test_a_criterion_takes_the_outputs_apart(form: str) -> None:
    """The model returns the container, and the criterion reads it."""
    row = FORMS[form]

    class Returning(Net):
        def forward(self, batch: Any) -> Any:
            return row.make(super().forward(batch), row.y_of(batch))

    net = Returning(row)
    module, optimizer, _, criterion = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=POLICY.clip_norm,
        loss_reduction="sum",
        criterion=lambda output: F.cross_entropy(row.x_of(output), row.y_of(output)),
    )
    seen = taken(module, optimizer)
    criterion(module(row.make(*examples_of(B)))).backward()
    optimizer.step()
    assert_exact(seen[-1], expected_sum())


# -- batches of the private loader, some of them empty -----------------------------------------------------------------


def dataset(form: Form) -> tuple[TensorDataset, Callable[[list[Any]], Any]]:
    def collate(examples: list[Any]) -> Any:
        if form.sorted:
            examples = sorted(examples, key=lambda e: -int((e[0] != 0).sum()))
        return form.make(torch.stack([e[0] for e in examples]), torch.stack([e[1] for e in examples]))

    return TensorDataset(*examples_of(12, seed=3)), collate


def sums_at_the_explicit_door(form: Form, **options: Any) -> tuple[list[int], list[dict[str, Tensor]]]:
    step, seen = explicit(form, expected=None, noise_generator=torch.Generator().manual_seed(4), **options)
    data, collate = dataset(form)
    sizes = [len(step(batch)) for batch in step.batches(data, collate_fn=collate)]
    return sizes, seen


def sums_at_the_papers_door(form: Form, most: int | None) -> tuple[list[int], list[dict[str, Tensor]]]:
    data, collate = dataset(form)
    ordinary = DataLoader(data, batch_size=3, collate_fn=collate)
    key = torch.Generator().manual_seed(6)
    module, optimizer, private, seen = paper(form, ordinary, noise_generator=key)
    sizes = []

    def train(batches: Any) -> None:
        for batch in batches:
            optimizer.zero_grad()
            outputs = module(batch)
            sizes.append(len(outputs))
            F.cross_entropy(outputs, form.y_of(batch), reduction="sum").backward()
            optimizer.step()

    for _ in range(3):
        if most is None:
            train(private)
        else:
            manager = BatchMemoryManager(data_loader=private, max_physical_batch_size=most, optimizer=optimizer)
            with manager as physical:
                train(physical)
    return sizes, seen


@EACH
@pytest.mark.parametrize("options", [{}, {"physical_batch_size": 2}], ids=["whole", "physical"])
def test_sampled_batches_at_the_explicit_door(form: str, options: dict[str, Any]) -> None:
    sizes, seen = sums_at_the_explicit_door(FORMS[form], **options)
    expected_sizes, expected = sums_at_the_explicit_door(FORMS["tuple"])
    assert sizes == expected_sizes
    assert 0 in sizes
    assert max(sizes) > 2
    assert len(seen) == len(expected) == 12
    assert all(distance(*pair) <= 1e-9 * POLICY.clip_norm for pair in zip(seen, expected, strict=True))


@EACH
@pytest.mark.parametrize("most", [None, 2], ids=["whole", "virtual"])
def test_sampled_batches_at_the_papers_door(form: str, most: int | None) -> None:
    sizes, seen = sums_at_the_papers_door(FORMS[form], most)
    whole, expected = sums_at_the_papers_door(FORMS["tuple"], None)
    assert sum(sizes) == sum(whole)
    assert 0 in sizes
    assert max(whole) > 2
    assert most is None or max(sizes) <= most
    assert len(seen) == len(expected) == 12
    assert all(distance(*pair) <= 1e-9 * POLICY.clip_norm for pair in zip(seen, expected, strict=True))


# -- bad input ---------------------------------------------------------------------------------------------------------


class Closed:
    """A batch that nobody can look into."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


CLOSED = Form(Closed, lambda b: b.x, lambda b: b.y)
HALF = Form(lambda x, y: (x, Closed(x, y)), lambda b: b[0], lambda b: b[1].y)
REMEDY = r"torch\.utils\._pytree\.register_pytree_node"


def test_a_batch_of_a_class_that_nobody_registered_is_refused_at_both_doors() -> None:
    step, seen = explicit(CLOSED)
    with pytest.raises(UnsupportedModelError, match=rf"the batch is a Closed.*{REMEDY}"):
        step(Closed(*examples_of(B)))
    module, _, _, also = paper(CLOSED, loader())
    with pytest.raises(UnsupportedModelError, match=rf"the inputs\[0\] is a Closed.*{REMEDY}"):
        module(Closed(*examples_of(B)))
    assert not seen
    assert not also
    assert step.ledger.steps == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"physical_batch_size": 7}, ConfigurationError),  # it cannot be cut
        ({"physical_batch_size": 24, "padded": True}, UnsupportedModelError),  # it cannot be given one example more
        ({}, UnsupportedModelError),
    ],
)
def test_a_part_that_nobody_can_look_into_is_named(options: dict[str, Any], error: type[Exception]) -> None:
    step, seen = explicit(HALF, **options)
    with pytest.raises(error, match=rf"\[1\] is a Closed.*{REMEDY}"):
        step(HALF.make(*examples_of(B)))
    assert not seen
    assert step.ledger.steps == 0


def test_a_generator_is_refused_before_it_is_read() -> None:
    lazy = (t for t in examples_of(B)[1])
    form = Form(lambda x, y: (x, lazy), lambda b: b[0], lambda b: torch.stack(list(b[1])))
    step, seen = explicit(form)
    with pytest.raises(ConfigurationError, match=r"the inputs\[1\] is a generator.*make it a list"):
        step(form.make(*examples_of(B)))
    assert len(list(lazy)) == B
    assert not seen


def test_a_closed_batch_of_the_loader_is_asked_of_the_collate_function() -> None:
    data, _ = dataset(FORMS["tuple"])
    step, _ = explicit(CLOSED)
    with pytest.raises(ConfigurationError, match="the batch, a Closed, cannot be cut to no examples"):
        step.batches(data, collate_fn=lambda e: Closed(torch.stack([x for x, _ in e]), torch.stack([y for _, y in e])))


def test_a_criterion_names_what_it_cannot_split() -> None:
    def criterion(output: Tensor, y: Any) -> Tensor:
        raise AssertionError("it must not be asked")

    net = Net(FORMS["tuple"])
    module, _, _, private = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        criterion=criterion,
    )
    outputs = module(examples_of(B))
    y = examples_of(B)[1]
    for odd, found in ((y.numpy(), "an ndarray"), (y[:3], "a Tensor of shape (3,) in the arguments[1]")):
        with warnings.catch_warnings(), pytest.raises(ConfigurationError) as caught:
            private(outputs, odd)
        assert found.replace("an ndarray", "ndarray of shape (20,) in the arguments[1]") in str(caught.value)
        assert "a Tensor of shape (20, 3) in the arguments[0]" in str(caught.value)
