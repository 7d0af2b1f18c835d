"""Compiled steps on ranks that each hold the whole model go where eager steps of one process go."""

from __future__ import annotations

import warnings

import pytest
from torch.nn.parallel import DistributedDataParallel

from privet import Performance
from privet.errors import RanksError, UnsupportedModelError
from privet.gradients.passes.compiled import CompiledSum, step_graph
from tests.parallel.models import data, digest, mechanism, net, step_on, weights
from tests.parallel.ranks import run

pytestmark = pytest.mark.deep  # it takes half a minute

COMPILED = Performance(compile=True)
SMALL = Performance(compile=True, physical_batch_size=3)
RARE = {"what": mechanism(rate=0.03, steps=4)}  # batches of two: most of them leave a rank without an example


def trained(model, **options):
    """Returns the weights after a run with noise, and its ε."""
    step = step_on(model, **options)
    for batch in step.batches(data()):
        step(batch)
    assert isinstance(step._way.engine, CompiledSum) == bool(options.get("performance"))
    return weights(model), step.epsilon(1e-5), step.ledger.steps


def refused_on_one(rank):
    """The model of rank 1 branches on values, which no graph can. Returns what each rank raised, and its bill."""
    model = net()

    def forward(x):
        hidden = model.norm(model.inner(x))
        return model.head(hidden * 2.0 if rank and bool(hidden.sum() > 1e9) else hidden)

    model.forward = forward
    step = step_on(model, performance=COMPILED)
    try:
        step(next(iter(step.batches(data()))))
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return type(error), str(error), step.ledger.steps
    return None


def scenario(rank, world, folder, backend):
    step_graph._BACKEND = backend
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's own, as it loads its compiler
    return {
        "wrapped, small parts": trained(DistributedDataParallel(net()), performance=SMALL),
        "empty shares": trained(net(), performance=COMPILED, **RARE),
        "refused": refused_on_one(rank),
    }


# What is traced is the same for both. Only one of them compiles it.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_compiled_steps_go_where_eager_ones_of_one_process_go(backend):
    ranks = run(scenario, backend)
    start = weights(net())
    for way in ("wrapped, small parts", "empty shares"):
        there, *books = trained(net(), **(RARE if way == "empty shares" else {}))
        moved = (there - start).norm()
        assert moved > 0.1
        for found in ranks:
            assert (found[way][0] - there).norm() < 1e-6 * moved
            assert [*found[way][1:]] == books
        assert len({digest(found[way][0]) for found in ranks}) == 1, "ranks hold other bits"
    (other, said, steps), (own, why, own_steps) = (found["refused"] for found in ranks)
    assert own is UnsupportedModelError
    assert "graph" in why
    assert other is RanksError
    assert "rank 1 failed" in said
    assert steps == own_steps == 0
