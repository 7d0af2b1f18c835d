"""Tensor parallel training equals one process: sums, norms, noise, trajectories, ε; other plans are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F

from privet import Gaussian, Mechanism, Performance, PerLayer, Poisson
from privet.errors import ConfigurationError, RanksError, UnsupportedModelError
from privet.parallel import forwards
from tests.parallel.parallel_plans import both, model, planned
from tests.parallel.ranks import run
from tests.parallel.sharded_models import (
    apart,
    engine_on_texts,
    loop,
    said,
    step_on_texts,
    summed,
    texts,
    trained,
    whole,
)

TWO = Performance(passes=2)
ALL = {"sequence": True, "embedding": "rows"}


def per_layer():
    return Mechanism(sampling=Poisson(0.5), clipping=PerLayer(0.3), noise=Gaussian(0.0), steps=1)


# By name: options of the model, of its plan, and of the step.
SUMS = {
    "positions and vocabulary": ({}, ALL, {}),
    "columns of a table": ({}, {"embedding": "columns"}, {}),
    "tied": ({"tied": True}, {"embedding": "rows"}, {}),
    "sizes that do not divide": ({"vocabulary": 13, "padding": 8}, {"embedding": "rows"}, {}),
    "two passes, recomputed": ({"again": True}, ALL, {"performance": TWO}),
    "per layer": ({}, ALL, {"what": per_layer()}),
    "empty batches": ({}, {}, {"rate": 0.02, "steps": 4}),
}


def passes(prepare, **options):
    engine, made, optimizer, loader = engine_on_texts(prepare(model()), **options)
    loop(made, optimizer, loader)
    return said(engine, made)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A layer that does with its weight what no plan knows."""

    def forward(self, x):
        return F.linear(x, 2.0 * self.weight, self.bias)


class Loose(nn.Module):
    """A norm that is in no plan, and meets some of the positions on each rank."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.norm(self.table(ids)))


def raised(action):
    """Returns the class and the message of what an action raises, or None."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return type(error), str(error)
    return None


def one_step(made):
    step = step_on_texts(made, optimizer=torch.optim.SGD(made.parameters(), lr=0.1))
    step(next(iter(step.batches(texts()))))


def scaled(mesh):
    made = model()
    made.head = Scaled(8, 11)
    return parallelize_module(made, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})


def loose(mesh):
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(Loose(), mesh, plan)


def over_examples(mesh):
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "head": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    return parallelize_module(Loose(), mesh, plan)


def in_parts(mesh):
    made = parallelize_module(model(), mesh, {"head": ColwiseParallel(use_local_output=False)})
    step = step_on_texts(made, optimizer=torch.optim.SGD(made.parameters(), lr=0.1))
    step._loss._loss = lambda model, batch: model(batch[0][:, :-1]).square().mean((1, 2))
    step(next(iter(step.batches(texts()))))


def other_batches(rank):
    step = step_on_texts(planned(model()))
    step((torch.full((4, 5), rank),))


# By name: what is done, and what the error says.
REFUSED = {
    "another operation": (lambda mesh, rank: one_step(scaled(mesh)), "head.weight, of which each rank holds a part"),
    "a norm without a plan": (lambda mesh, rank: one_step(loose(mesh)), "on some of them: norm.bias, norm.weight"),
    "examples on ranks": (lambda mesh, rank: one_step(over_examples(mesh)), "whose examples lie on several ranks"),
    "losses in parts": (lambda mesh, rank: in_parts(mesh), "output_layouts=Replicate()"),
    "other batches": (lambda mesh, rank: other_batches(rank), "were given different batches"),
    "shown": (lambda mesh, rank: engine_on_texts(planned(model()), grad_sample_mode="hooks"), "grad_sample_mode"),
    "compiled": (
        lambda mesh, rank: step_on_texts(planned(model()), performance=Performance(compile=True)),
        "compile=True",
    ),
}


def counted_twice():
    """A planted mistake: parameters that are whole on every rank count on each of them."""
    right = forwards.Gathered.counted
    forwards.Gathered.counted = lambda self, parameters: parameters
    try:
        return summed(planned(model(), **ALL))
    finally:
        forwards.Gathered.counted = right


def not_added_up():
    """A planted mistake: the norm of each part is taken for the norm of all."""
    right = forwards._NormsOfParts.sum
    forwards._NormsOfParts.sum = lambda self, squared: squared
    try:
        return summed(planned(model(), **ALL))
    finally:
        forwards._NormsOfParts.sum = right


def sums(rank, world, folder):
    return {
        "sums": {name: summed(planned(model(**m), **plan), **step) for name, (m, plan, step) in SUMS.items()},
        "mistakes": [counted_twice(), not_added_up()],
    }


def runs(rank, world, folder):
    mesh = init_device_mesh("cpu", (2,))
    return {
        "run": trained(planned(model(), **ALL)),
        "engine": passes(lambda made: planned(made, **ALL)),
        "refused": {name: raised(lambda does=does: does(mesh, rank)) for name, (does, _) in REFUSED.items()},
        "repr": repr(engine_on_texts(planned(model()))[0]),
    }


@pytest.fixture(scope="module")
def ranks():
    return [one | other for one, other in zip(run(sums), run(runs), strict=True)]


@pytest.fixture(scope="module")
def start():
    return {name: whole(p) for name, p in model().named_parameters()}


def alone(way):
    options, _, step = SUMS[way]
    step = {key: value for key, value in step.items() if key != "performance"}
    return summed(model(**{**options, "again": False}), **step)


@pytest.mark.parametrize("way", SUMS)
def test_the_clipped_sum_is_that_of_one_process(ranks, way):
    wanted = alone(way)
    assert len(wanted) == (4 if "empty" in way else 1)
    assert any(apart(each, each)[1] > 0.01 for each in wanted)
    for found in ranks:
        for got, each in zip(found["sums"][way], wanted, strict=True):
            distance, size = apart(got, each)
            assert distance <= 1e-5 * size


def test_norms_that_lack_parts_or_count_them_twice_would_be_found(ranks):
    (wanted,) = alone("positions and vocabulary")
    for found in ranks:
        for (got,) in found["mistakes"]:
            distance, size = apart(got, wanted)
            assert distance > 1e-2 * size


def test_ten_steps_of_adamw_with_noise_go_where_those_of_one_process_go(ranks, start):
    there, epsilon, sizes = trained(model())
    moved, _ = apart(start, there)
    assert moved > 0.5
    for found in ranks:
        got, its_epsilon, its_sizes = found["run"]
        assert apart(got, there)[0] < 1e-6 * moved
        assert (its_epsilon, its_sizes) == (epsilon, sizes)


def test_a_pass_at_the_door_of_the_paper_goes_where_that_of_one_process_goes(ranks, start):
    there, *books = passes(lambda made: made)
    moved, _ = apart(start, there)
    assert moved > 0.1
    for found in ranks:
        assert apart(found["engine"][0], there)[0] < 2e-6 * moved
        assert [*found["engine"][1:]] == books


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_plan_is_known_for_is_an_error_on_every_rank(ranks, what):
    for kind, message in (found["refused"][what] for found in ranks):
        assert issubclass(kind, ConfigurationError | UnsupportedModelError | RanksError)
        assert REFUSED[what][1] in message


def test_what_was_found_is_said(ranks):
    assert all("ranks: 2 ranks, a tensor parallel plan on each, gloo" in found["repr"] for found in ranks)


# -- with fully_shard over the other half of the ranks -----------------------------------------------------------------


def evaluated(made):
    """Runs the model before the first step and between steps, which leaves gathered parameters in place."""
    engine, made, optimizer, loader = engine_on_texts(made)
    for batch in loader:
        made.eval()
        with torch.no_grad():
            made(texts()[:3][0][:, :-1])
        made.train()
        loop(made, optimizer, [batch])
    return said(engine, made)


def partly(mesh):
    return parallelize_module(model(), mesh["tp"], {"head": ColwiseParallel(output_layouts=Replicate())})


def four(rank, world, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return {"sum": summed(both(model(), **ALL)), "some ranks": raised(lambda: engine_on_texts(partly(mesh)))}


def four_for_long(rank, world, folder):
    return {"run": trained(both(model(), **ALL)), "engine": evaluated(both(model(), **ALL))}


@pytest.fixture(scope="module")
def on_four():
    return run(four, world=4)


def test_with_fully_shard_on_two_dimensions_the_clipped_sum_is_that_of_one_process(on_four):
    (wanted,) = alone("positions and vocabulary")
    for found in on_four:
        distance, size = apart(found["sum"][0], wanted)
        assert distance <= 1e-5 * size


def test_a_plan_on_some_ranks_alone_is_refused(on_four):
    for kind, message in (found["some ranks"] for found in on_four):
        assert kind is ConfigurationError
        assert "fully_shard(module, mesh=mesh['dp'])" in message


@pytest.mark.deep
def test_with_fully_shard_on_two_dimensions_all_goes_where_one_process_goes(start):
    there, epsilon, sizes = trained(model())
    moved, _ = apart(start, there)
    evaluated_there, *books = evaluated(model())
    found = run(four_for_long, world=4)
    for each in found:
        assert apart(each["run"][0], there)[0] < 1e-6 * moved
        assert each["run"][1] == epsilon
        assert apart(each["engine"][0], evaluated_there)[0] < 2e-6 * moved
        assert [*each["engine"][1:]] == books
    # The two ranks of one tensor parallel group see the same examples, and the two groups see all of them.
    shares = [each["run"][2] for each in found]
    assert shares[0] == shares[1]
    assert shares[2] == shares[3]
    assert [a + b for a, b in zip(shares[0], shares[2], strict=True)] == sizes
