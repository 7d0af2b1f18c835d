"""Lightning trains as the hand-written loop does: the same sums, the same ε, however it is interrupted."""

from __future__ import annotations

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from privet import Budget, PrivacyEngine
from privet.errors import ConfigurationError, CoverageError
from privet.integrations.lightning import PrivateTraining
from tests.integrations.lightning_models import (
    BATCH,
    DELTA,
    Classifier,
    Validated,
    by_hand,
    data,
    flat,
    loader,
    net,
    seed,
    trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def private(**options):
    return PrivateTraining(**{"noise_multiplier": 1.0, "max_grad_norm": 0.7, "noise_generator": seed(), **options})


@pytest.fixture(scope="module")
def three_epochs():
    """What the hand-written loop gives after three epochs."""
    return by_hand(3, noise_multiplier=1.0)


@pytest.mark.parametrize("kind", [{}, {"manual": True}, {"direct": True}], ids=["automatic", "manual", "a part"])
def test_the_same_key_gives_the_weights_and_the_epsilon_of_the_hand_written_loop(kind, three_epochs):
    callback, model = private(module="net" if kind.get("direct") else None), Validated(**kind)
    fit = trainer(callback, max_epochs=3)
    fit.fit(model, loader(), loader())
    assert fit.global_step == 12
    assert model.validations >= 3 * 4
    weights = by_hand(3, kind=net, noise_multiplier=1.0)[0] if kind.get("direct") else three_epochs[0]
    torch.testing.assert_close(flat(model), weights, rtol=1e-5, atol=1e-6)
    assert callback.get_epsilon(DELTA) == three_epochs[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_without_noise_the_weights_are_those_of_the_hand_written_loop(precision):
    model = Classifier()
    trainer(private(noise_multiplier=0.0), max_epochs=2, precision=precision).fit(model, loader())
    reference, _ = by_hand(2, noise_multiplier=0.0, autocast=precision == "bf16-mixed")
    torch.testing.assert_close(flat(model), reference, rtol=1e-3, atol=1e-4)


def scaled(init_scale=2.0**12):
    """The plugin of precision="16-mixed", on a CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))]}


@pytest.mark.parametrize("kind", [{}, {"manual": True}], ids=["automatic", "manual"])
def test_in_half_precision_the_scale_of_the_loss_cancels_before_norms_are_taken(kind):
    callback, model = private(noise_multiplier=0.0), Classifier(**kind)
    fit = trainer(callback, max_epochs=2, **scaled())
    fit.fit(model, loader())
    reference, _ = by_hand(2, noise_multiplier=0.0)
    assert fit.global_step == callback.engine.ledger.steps == 8
    torch.testing.assert_close(flat(model), reference, rtol=3e-3, atol=3e-3)


def test_in_half_precision_noise_and_parts_of_a_step_are_those_of_single_precision(three_epochs):
    callback, model = private(), Classifier()
    trainer(callback, max_epochs=3, accumulate_grad_batches=2, **scaled()).fit(model, loader(BATCH // 2))
    torch.testing.assert_close(flat(model), three_epochs[0], rtol=3e-3, atol=1e-2)
    assert callback.get_epsilon(DELTA) == three_epochs[1]


def test_in_half_precision_examples_that_overflow_add_nothing_and_the_step_is_taken():
    model = Classifier()
    before, callback = flat(model), private(noise_multiplier=0.0)
    fit = trainer(callback, max_epochs=1, **scaled(2.0**40))  # no gradient is finite in float16
    fit.fit(model, loader())
    assert fit.global_step == callback.engine.ledger.steps == 4
    assert torch.equal(flat(model), before)


def test_in_half_precision_a_budget_that_is_met_ends_fit():
    engine = PrivacyEngine(budget=Budget(epsilon=by_hand(1, noise_multiplier=1.0)[1] + 1e-3, delta=DELTA))
    callback = private(engine=engine)
    trainer(callback, max_epochs=3, **scaled()).fit(Classifier(), loader())
    assert callback.stopped_by_budget
    assert engine.ledger.steps == 4


@pytest.mark.parametrize(
    ("at", "every"), [(8, {"every_n_epochs": 1}), (6, {"every_n_train_steps": 6})], ids=["epoch end", "mid-epoch"]
)
def test_a_resumed_run_goes_on_with_its_weights_its_batches_and_its_epsilon(tmp_path, at, every, three_epochs):
    def keeping():
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)

    trainer(private(), keeping(), max_epochs=2, enable_checkpointing=True).fit(Classifier(), loader())
    resumed, model = private(), Classifier()
    again = trainer(resumed, keeping(), max_epochs=3, enable_checkpointing=True)
    again.fit(model, loader(), ckpt_path=tmp_path / f"step={at}.ckpt")
    torch.testing.assert_close(flat(model), three_epochs[0], rtol=1e-5, atol=1e-6)
    # The ledger holds two runs that are put together: both figures are upper bounds of one value.
    assert resumed.get_epsilon(DELTA) == pytest.approx(three_epochs[1], abs=2e-3)
    assert resumed.engine.ledger.steps == again.global_step == 12


def test_accumulated_batches_are_parts_of_one_step_also_when_it_is_resumed_in_mid_epoch(tmp_path, three_epochs):
    settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True}

    def keeping():
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)

    trainer(private(), keeping(), max_epochs=2, **settings).fit(Classifier(), loader(BATCH // 2))
    callback, model = private(), Classifier()
    fit = trainer(callback, keeping(), max_epochs=3, **settings)
    fit.fit(model, loader(BATCH // 2), ckpt_path=tmp_path / "step=6.ckpt")
    assert fit.global_step == callback.engine.ledger.steps == 12
    torch.testing.assert_close(flat(model), three_epochs[0], rtol=1e-5, atol=1e-6)
    assert callback.get_epsilon(DELTA) == pytest.approx(three_epochs[1], abs=2e-3)


class Accumulating(Classifier):
    """Steps on every second batch by itself."""

    def __init__(self):
        super().__init__(manual=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.manual_backward(F.cross_entropy(self(x), y) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()


def test_a_module_that_accumulates_by_itself_declares_it(three_epochs):
    callback, model = private(accumulate=2), Accumulating()
    trainer(callback, max_epochs=3).fit(model, loader(BATCH // 2))
    torch.testing.assert_close(flat(model), three_epochs[0], rtol=1e-5, atol=1e-6)
    assert callback.get_epsilon(DELTA) == three_epochs[1]


def test_a_run_that_was_saved_inside_of_a_step_is_not_resumed(tmp_path):
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    trainer(private(), Saving(), max_epochs=1, accumulate_grad_batches=2).fit(Classifier(), loader(BATCH // 2))
    with pytest.raises(ConfigurationError, match=r"after 3 batches.*in the middle of a step, which accumulates 2"):
        trainer(private(), max_epochs=1, accumulate_grad_batches=2).fit(
            Classifier(), loader(BATCH // 2), ckpt_path=tmp_path / "cut.ckpt"
        )


def test_lightning_says_that_the_callback_is_missing_where_a_private_run_is_resumed_without_it(tmp_path):
    fit = trainer(private(), max_epochs=1)
    fit.fit(Classifier(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"need to be provided .*PrivateTraining"):
        trainer(max_epochs=1).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_epsilon_is_logged_and_shown(tmp_path):
    callback = private()
    fit = trainer(callback, logger=CSVLogger(tmp_path), max_epochs=2, log_every_n_steps=2)
    fit.fit(Classifier(), loader())
    assert fit.progress_bar_metrics["epsilon"] == pytest.approx(callback.get_epsilon(DELTA), rel=1e-5)
    (file,) = tmp_path.rglob("metrics.csv")
    shown = [float(row["epsilon"]) for row in csv.DictReader(file.read_text().splitlines()) if row["epsilon"]]
    assert shown == sorted(shown)
    assert len(set(shown)) >= 4
    assert shown[-1] == pytest.approx(callback.get_epsilon(DELTA), rel=1e-5)
    assert not [name for name in fit.callback_metrics if "clip" in name]  # it is not private


def test_the_clip_fraction_is_shown_where_it_is_asked_for_and_marked():
    callback = private(log_clip_fraction=True, max_grad_norm=1e-3)
    fit = trainer(callback, max_epochs=1)
    fit.fit(Classifier(), loader())
    assert float(fit.progress_bar_metrics["clip_fraction (not private)"]) == 1.0
    assert "statistics without noise were collected" in callback.engine.ledger.marks


def test_a_budget_that_is_met_ends_fit_and_keeps_the_weights(tmp_path):
    engine = PrivacyEngine(budget=Budget(epsilon=by_hand(1, noise_multiplier=1.0)[1] + 1e-3, delta=DELTA))
    callback, model = private(engine=engine), Validated()
    fit = trainer(callback, max_epochs=5)
    fit.fit(model, loader(), loader())
    assert callback.stopped_by_budget
    assert engine.ledger.steps == 4
    assert fit.state.finished
    assert fit.current_epoch < 3
    trained, _ = by_hand(1, noise_multiplier=1.0)
    torch.testing.assert_close(flat(model), trained, rtol=1e-5, atol=1e-6)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = private(engine=None)
    again.engine.set_budget(epsilon=engine.budget.epsilon, delta=DELTA)
    trainer(again, max_epochs=9).fit(kept := Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.stopped_by_budget
    torch.testing.assert_close(flat(kept), trained, rtol=1e-5, atol=1e-6)


def test_a_target_is_met_by_the_epochs_of_the_trainer():
    callback = private(noise_multiplier=None, target_epsilon=2.0, target_delta=DELTA)
    fit = trainer(callback, max_epochs=2)
    fit.fit(Classifier(), loader())
    assert not callback.stopped_by_budget
    assert 1.9 < callback.get_epsilon(DELTA) <= 2.0
    by_steps = private(noise_multiplier=None, target_epsilon=2.0, target_delta=DELTA)
    trainer(by_steps, max_epochs=-1, max_steps=8).fit(Classifier(), loader())
    assert by_steps.engine.mechanisms[0].noise == callback.engine.mechanisms[0].noise


class Scheduled(Classifier):
    """Asks the trainer for the number of steps, which makes it set up the user's own loader first."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        assert steps == 8
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps), "interval": "step"}
        ]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


def test_the_number_of_steps_may_be_asked_first_and_data_come_from_a_module():
    callback = private()
    trainer(callback, max_epochs=2).fit(Scheduled(), datamodule=Data())
    assert callback.engine.ledger.steps == 8
    assert callback.engine.ledger.marks == ("reproducible key",)
    assert callback.engine.mechanisms[0].sampling.rate == BATCH / len(data())


def test_a_training_step_that_goes_past_the_module_is_refused_with_what_to_write():
    model = Classifier(direct=True)
    before = flat(model)
    with pytest.raises(CoverageError) as raised:
        trainer(private(), max_epochs=1).fit(model, loader())
    assert any("PrivateTraining(module='net')" in note for note in raised.value.__notes__)
    assert torch.equal(flat(model), before)
