"""Fully sharded training at the paper's door, and what is refused at both."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from privet import BatchMemoryManager, Exponential, Performance, Schedule, register_rule
from privet.errors import ConfigurationError, CoverageError, RanksError
from privet.gradients.rules import custom
from tests.parallel.ranks import run, start
from tests.parallel.sharded_models import (
    apart,
    engine_on_texts,
    language,
    loop,
    loss,
    said,
    sharded,
    step_on_texts,
    texts,
    whole,
)


def same(model):
    return model


def passes(wrap, **options):
    engine, model, optimizer, loader = engine_on_texts(wrap(language()), **options)
    loop(model, optimizer, loader)
    return said(engine, model)


def small_parts(wrap):
    engine, model, optimizer, loader = engine_on_texts(wrap(language()))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        loop(model, optimizer, parts)
    return said(engine, model)


def scheduled(wrap):
    engine, model, optimizer, loader = engine_on_texts(wrap(language()))
    schedule = Schedule(optimizer, noise=Exponential(0.9), rate=Exponential(0.8))
    loop(model, optimizer, loader, schedule=schedule)
    return said(engine, model)


def frozen(wrap):
    model = language()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    engine, model, optimizer, loader = engine_on_texts(wrap(model), clipping="per_layer")
    loop(model, optimizer, loader)
    return said(engine, model)


def evaluated(wrap):
    """Before and between the steps the model is run for something else, which leaves gathered parameters in place."""
    ids = texts()[:3][0]
    model = wrap(language())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with torch.no_grad():
        model(ids)
    engine, model, optimizer, loader = engine_on_texts(model, optimizer=optimizer)
    for batch in loader:
        model.eval()
        with torch.no_grad():
            model(ids)
        model.train()
        loop(model, optimizer, [batch])
    return said(engine, model)


WAYS = {
    "plain": passes,
    "small parts": small_parts,
    "schedules": scheduled,
    "partition": lambda wrap: passes(wrap, poisson_sampling=False),
    "mostly empty": lambda wrap: passes(wrap, batch_size=2),
    "frozen, per layer": frozen,
    "psac": lambda wrap: passes(wrap, clipping="psac"),
    "evaluated": evaluated,
}


# -- what is refused ---------------------------------------------------------------------------------------------------


def raised(action):
    """Returns the class and the message of what an action raises, or None."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return type(error), str(error)
    return None


def sharded_late():
    """The model is sharded after it was made private."""
    _, model, optimizer, loader = engine_on_texts(language())
    loop(sharded(model), optimizer, loader)


def parts_alone():
    """The blocks are sharded, and the rest is not."""
    model = language()
    for block in model.blocks:
        fully_shard(block)
    engine_on_texts(model)


def two_meshes():
    model = language()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))
    fully_shard(model.blocks[1])
    fully_shard(model)
    engine_on_texts(model)


def first_generation():
    """FullyShardedDataParallel does not run on a CPU, but can be looked at."""
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    model = wrapped._fsdp_wrapped_module = language()
    engine_on_texts(wrapped, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def own_rule():
    class Twice(nn.Linear):
        pass

    register_rule(Twice)(lambda module, inputs, gradient: {})
    try:
        model = nn.Sequential(Twice(3, 3))
        fully_shard(model)
        step_on_texts(model)
    finally:
        custom._MODULES.pop(Twice)


def in_a_file(folder):
    engine, model, optimizer, _ = engine_on_texts(sharded(language()))
    engine.save_checkpoint(folder / "run.pt", module=model, optimizer=optimizer)


def searching():
    _, _, optimizer, loader = engine_on_texts(sharded(language()))
    BatchMemoryManager(data_loader=loader, max_physical_batch_size="auto", optimizer=optimizer)


def penalty(where, *, sync=False):
    """A gradient reaches a parameter past the capture. Returns what is raised, and which gradients are left."""
    engine, model, optimizer, loader = engine_on_texts(sharded(language()))
    batches = iter(loader)
    loop(model, optimizer, [next(batches)])
    optimizer.zero_grad()
    model.set_requires_gradient_sync(sync)
    added = []

    def inside(module, args, output):
        with torch._C.DisableTorchFunctionSubclass():
            added.append(module.weight.square().sum())

    if where == "inside":
        model.blocks[0].up.register_forward_hook(inside)

    def step():
        losses = loss(model, next(batches)).mean()
        extra = added[0] if where == "inside" else model.blocks[0].up.weight.to_local().square().sum()
        (losses + extra).backward()

    before = {n: whole(p) for n, p in model.named_parameters()}
    found = raised(step)
    capture = engine._watched[0].instrument.capture
    left = [n for n, p in model.named_parameters() if p.grad is not None]
    left += [n for n, p in capture.parameters.items() if p.grad is not None]
    moved, _ = apart({n: whole(p) for n, p in model.named_parameters()}, before)
    return found, left, moved


def said_passes(**options):
    """Returns how many backwards a step takes where every block is recomputed by torch's wrapper, and its names."""
    model = language(simple=True)
    for index in range(len(model.blocks)):
        model.blocks[index] = checkpoint_wrapper(model.blocks[index])
    step = step_on_texts(sharded(model), **options)
    for batch in step.batches(texts()):
        step(batch)
        break
    return step._way.passes, sorted(step._update.parameters)


def within_budget(most):
    """Returns how many backwards a step takes that may keep so many bytes, which need not be alike on all ranks."""
    step = step_on_texts(sharded(language(simple=True)), performance=Performance(activation_budget=most))
    step(next(iter(step.batches(texts()))))
    return step._way.passes


def scenario(rank, world, folder):
    found = {name: way(sharded) for name, way in WAYS.items()}
    found["passes"] = said_passes(), said_passes(performance=Performance(passes=1))
    found["budget"] = within_budget(10**9), within_budget(1), within_budget(1 if rank else 10**9)
    found["refused"] = {
        "late": raised(sharded_late),
        "parts alone": raised(parts_alone),
        "two meshes": raised(two_meshes),
        "first generation": raised(first_generation),
        "shown": raised(lambda: engine_on_texts(sharded(language()), grad_sample_mode="hooks")),
        "auto": raised(lambda: step_on_texts(sharded(language()), performance=Performance(physical_batch_size="auto"))),
        "search": raised(searching),
        "compiled": raised(lambda: step_on_texts(sharded(language()), performance=Performance(compile=True))),
        "own rule": raised(own_rule),
        "file": raised(lambda: in_a_file(folder)),
    }
    found["penalties"] = [penalty("inside"), penalty("inside", sync=True), penalty("outside")]
    engine, *_ = engine_on_texts(sharded(language()))
    return {**found, "repr": repr(engine)}


@pytest.fixture(scope="module")
def ranks():
    return run(scenario)


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_goes_where_that_of_one_process_goes(ranks, way):
    there, epsilon, steps, marks = WAYS[way](same)
    start = {name: whole(p) for name, p in language().named_parameters()}
    moved, _ = apart(start, there)
    assert moved > 0.1
    for found in ranks:
        assert apart(found[way][0], there)[0] < 2e-6 * moved
        assert found[way][1:] == (epsilon, steps, marks)


def test_a_model_that_recomputes_takes_two_passes_unless_told_otherwise(ranks):
    names = sorted(name for name, _ in language(simple=True).named_parameters())
    for found in ranks:
        assert found["passes"] == ((2, names), (1, names))


def test_one_rank_above_its_activation_budget_takes_all_to_two_passes(ranks):
    assert [found["budget"] for found in ranks] == [(1, 2, 2), (1, 2, 2)]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("late", "or sharded since (fully_shard), do so before make_private"),
        ("parts alone", "table.weight, head.weight, head.bias. Expected all of them sharded. Call fully_shard on the"),
        ("two meshes", "sharded over 2 different meshes"),
        ("first generation", "torch.distributed.fsdp.fully_shard(block) for each block"),
        ("shown", "grad_sample_mode='hooks'"),
        ("auto", "physical_batch_size='auto'"),
        ("search", "max_physical_batch_size='auto'"),
        ("compiled", "compile=True"),
        ("own rule", "modules of a sharded model have rules of the user's own: 0."),
        ("file", "Expected torch.distributed.checkpoint"),
    ],
)
def test_what_a_sharded_model_does_not_allow_is_a_clear_error(ranks, what, words):
    for kind, message in (found["refused"][what] for found in ranks):
        assert kind in (ConfigurationError, RanksError)
        assert words in message


def test_a_gradient_past_the_capture_is_met_before_it_leaves_the_rank(ranks):
    for found in ranks:
        for (kind, message), left, moved in found["penalties"]:
            assert kind is CoverageError
            assert "a gradient reached blocks.0.up.weight" in message
            assert left == []
            assert moved == 0.0


def test_what_was_found_is_said(ranks):
    assert all("ranks: 2 ranks, fully_shard on each, gloo" in found["repr"] for found in ranks)


# -- failures of one rank ----------------------------------------------------------------------------------------------


def fails_alone(rank, world, folder):
    """The loss of rank 1 raises in its third step. Returns what each rank raised, then and at the next step."""
    model = sharded(language())
    step = step_on_texts(model)
    taken = 0

    def bad(model, batch):
        losses = loss(model, batch)
        if rank == 1 and taken == 2:
            raise ValueError("a bad record")
        return losses

    step._loss._loss = bad
    batches = iter(step.batches(texts()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while taken < 10:
            try:
                step(next(batches))
            except Exception as error:  # noqa: BLE001 - the test looks at what it is
                notes = " ".join(getattr(error, "__notes__", []))
                return type(error).__name__, f"{error} {notes}", raised(lambda: step(next(batches))), taken
            taken += 1
    return None


def test_a_rank_that_fails_inside_of_a_step_ends_the_others_and_does_not_go_on():
    found = start(fails_alone, timeout=20.0)
    assert not any(found.failed), found.failed
    (kind, _, (again, _), taken), (own, message, (after, _), own_taken) = found.results
    assert taken == own_taken == 2
    assert own == "ValueError"
    assert "The other ranks wait" in message
    assert kind != "ValueError"
    assert again is after is RanksError
