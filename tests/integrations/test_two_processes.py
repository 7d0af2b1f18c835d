"""Lightning's DDP strategy and Accelerate on two ranks: the weights, the steps and the ε of one process."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from privet.integrations.lightning import PrivateTraining
from tests.integrations import lightning_models, test_accelerate
from tests.integrations.lightning_models import BATCH, DELTA, Classifier, Validated, flat, loader, seed, trainer
from tests.parallel.ranks import start

pytestmark = pytest.mark.deep  # it takes half a minute


def as_launched(rank, world):
    """Sets what torchrun, or `accelerate launch`, tells its processes."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        TORCHELASTIC_RUN_ID="test",
        ACCELERATE_USE_CPU="true",
    )


def both(rank, world, folder):
    """Trains by Lightning with a checkpoint in between, then by Accelerate; each rank has half of a batch."""
    if world > 1:
        as_launched(rank, world)
    # In a process of its own, which has loaded neither.
    from tests.integrations import test_accelerate

    def lightning(epochs, model, **more):
        private = PrivateTraining(noise_multiplier=1.0, max_grad_norm=0.7, noise_generator=seed())
        fit = trainer(private, max_epochs=epochs, devices=world, strategy="ddp")
        batches = loader(BATCH // world)
        fit.fit(model, batches, batches if isinstance(model, Validated) else None, **more)
        return private, fit

    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    _, fit = lightning(1, Validated())
    fit.save_checkpoint(folder / "one.ckpt")
    private, fit = lightning(2, model := Classifier(), ckpt_path=folder / "one.ckpt")
    found = {
        "lightning": (flat(model), private.get_epsilon(DELTA), private.engine.ledger.steps),
        "global step": fit.global_step,
        "unwrapped": type(fit.strategy.model).__name__,
    }
    test_accelerate.BATCH = BATCH // world
    run = test_accelerate.Run()
    run.train()
    run.accelerator.save_state(folder)
    run = test_accelerate.Run()
    run.accelerator.load_state(folder)
    run.train()
    found["accelerate"] = (run.weights(), run.engine.get_epsilon(DELTA), run.engine.ledger.steps)
    return found


@pytest.fixture(scope="module")
def ranks():
    found = start(both, world=2)
    assert found.failed == [None, None], found.failed
    return found.results


def test_lightning_on_two_ranks_trains_as_the_hand_written_loop_in_one_process(ranks):
    alone = lightning_models.by_hand(2, noise_multiplier=1.0)
    agrees([rank["lightning"] for rank in ranks], alone, steps=8)
    assert [rank["global step"] for rank in ranks] == [8, 8]


def test_accelerate_on_two_ranks_trains_as_the_hand_written_loop_in_one_process(ranks):
    agrees([rank["accelerate"] for rank in ranks], test_accelerate.by_hand(2), steps=8)


def agrees(found, alone, *, steps):
    """Asserts that two ranks, which were resumed once, have the weights and the ε of an unbroken run in one process."""
    for weights, epsilon, taken in found:
        torch.testing.assert_close(weights, alone[0], rtol=1e-4, atol=1e-5)
        assert epsilon == pytest.approx(alone[1], abs=2e-3)  # of two runs that are put together
        assert taken == steps
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_wrapper_of_the_strategy_is_taken_off(ranks):
    assert [rank["unwrapped"] for rank in ranks] == ["Classifier", "Classifier"]
