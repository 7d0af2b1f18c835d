"""What a PrivateTrainer steps on is the sum of clipped gradients of each example's own loss, and ε is of all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BatchEncoding, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from privet import BudgetExceededError, ConfigurationError, PrivacyEngine
from privet.integrations.huggingface import PrivacyArguments, PrivateSeq2SeqTrainer, PrivateTrainer
from tests.integrations.huggingface_models import FAMILIES, N, batch_of, built

DELTA = 1e-5
SIMPLE = "classes"


def settings_of(path, **more):
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": N,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def arguments(path, **more):
    return TrainingArguments(**settings_of(path, **more))


def private(path, name=SIMPLE, *, noise=0.0, clip=0.1, kind=PrivateTrainer, told=None, data=None, **more):
    model, records = built(name)
    of_trainer = {key: more.pop(key) for key in ("compute_loss_func", "engine", "eval_dataset") if key in more}
    privacy = PrivacyArguments(noise_multiplier=noise, target_delta=DELTA, max_grad_norm=clip, **(told or {}))
    return kind(model, arguments(path, **more), train_dataset=data or records, privacy=privacy, **of_trainer)


def clipped_sum(model, data, clip):
    """Returns the sum of the clipped gradients of the model's own loss, taken one example after the other."""
    model = copy.deepcopy(model).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for record in data:
        loss = model(**batch_of([record])).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                total[name] += g * min(1.0, clip / float(norm))
    return total


def moved(trainer):
    """Trains, and returns how far each parameter went against its gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return {name: value - after[name].detach() for name, value in before.items()}


def assert_same(found, expected, *, divided_by=1.0, tolerance=1e-5):
    scale = torch.stack([e.norm() for e in expected.values()]).norm() / divided_by
    assert scale > 0
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert (found[name] - e / divided_by).norm() <= tolerance * scale, name


USUAL = ("classes", "tokens", "answers", "masked words", "GPT-2", "LoRA", "T5")


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.deep) for name in FAMILIES]
)
def test_a_step_is_the_clipped_sum_of_a_loop_by_hand(name, tmp_path):
    trainer = private(tmp_path, name)
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N)


@pytest.mark.parametrize("name", ["GPT-2", pytest.param(SIMPLE, marks=pytest.mark.deep)])
def test_accumulated_over_parts_it_is_the_same_sum(name, tmp_path):
    trainer = private(tmp_path, name, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N)
    assert trainer.engine.ledger.steps == trainer.state.global_step == 1


@pytest.mark.parametrize("parts", [1, 3])
def test_a_scaled_loss_gives_the_same_sum(parts, tmp_path):
    settings = {"per_device_train_batch_size": N // parts, "gradient_accumulation_steps": parts}
    trainer = private(tmp_path, "classes", **settings)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # as with fp16=True on a GPU
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N)
    assert trainer.engine.ledger.steps == 1


class Recording(PrivateTrainer):
    """Takes note of the examples of every part."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), inputs["labels"].tolist()]
        return super().training_step(model, inputs, num_items_in_batch)


def test_sampled_batches_come_in_as_many_parts_as_gradients_are_accumulated_over(tmp_path):
    _, data = built("a number")
    numbered = [{**record, "labels": torch.tensor(float(i))} for i, record in enumerate(data)]
    trainer = private(
        tmp_path, "a number", data=numbered, kind=Recording, per_device_train_batch_size=1,
        gradient_accumulation_steps=3, max_steps=8,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.seen) == 24
    sizes = set()
    for step in range(8):
        parts = trainer.seen[3 * step : 3 * step + 3]
        drawn = [label for part in parts for label in part]
        sizes.add(len(drawn))
        assert len(set(drawn)) == len(drawn)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(sizes) > 1  # they are drawn at random
    assert trainer.engine.ledger.steps == trainer.state.global_step == 8
    (phase,) = trainer.engine.ledger.phases
    assert phase.event.rate == 0.5


def test_a_run_with_empty_batches_goes_through_and_is_billed(tmp_path):
    trainer = private(tmp_path, noise=1.0, per_device_train_batch_size=1, max_steps=30, kind=Recording, logging_steps=1)
    trainer.train()
    assert any(not part for part in trainer.seen)  # but for one run in 200,000
    assert trainer.engine.ledger.steps == 30
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert all(loss == loss for loss in losses)  # noqa: PLR0124 - none is NaN


# -- epsilon ----------------------------------------------------------------------------------------------------------


ADAM = {"noise": 1.0, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
SPLIT = {1: {"per_device_train_batch_size": 3}, 2: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Returns runs of four steps, by the number of parts of a step; an epoch has two steps, or three."""
    trainers = {parts: private(tmp_path_factory.mktemp("whole"), **ADAM, **SPLIT[parts]) for parts in SPLIT}
    for trainer in trainers.values():
        trainer.train()
    return trainers


@pytest.mark.parametrize(("saved_at", "parts"), [(2, 1), (3, 1), (2, 2)], ids=["epoch", "mid-epoch", "in parts"])
def test_a_resumed_run_has_the_epsilon_of_the_unbroken_one(saved_at, parts, unbroken, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": saved_at}
    first = private(tmp_path, **{**ADAM, **SPLIT[parts], **saving, "max_steps": saved_at})
    first.train()
    second = private(tmp_path, **ADAM, **SPLIT[parts], **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == unbroken[parts].state.global_step == second.engine.ledger.steps == 4
    assert second.state.epoch == unbroken[parts].state.epoch
    whole = unbroken[parts].engine.get_epsilon(DELTA)
    assert second.engine.get_epsilon(DELTA) == pytest.approx(whole, rel=1e-3)
    assert whole > 1.05 * first.engine.get_epsilon(DELTA)


def test_a_checkpoint_without_the_ledger_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "noise": 1.0}
    private(tmp_path, save_only_model=True, **saving).train()
    second = private(tmp_path, max_steps=2, **saving)
    with pytest.raises(ConfigurationError, match="save_only_model=False"):
        second.train(resume_from_checkpoint=True)


def test_an_engine_of_ones_own_is_billed_for_all_of_its_trainings(tmp_path):
    engine = PrivacyEngine(unit="user")
    first = private(tmp_path, noise=1.0, max_steps=2, engine=engine)
    first.train()
    first.train()
    private(tmp_path, noise=1.0, engine=engine).train()
    assert engine.ledger.steps == 5


def test_a_model_that_is_built_anew_for_each_training_is_billed_for_all(tmp_path):
    data = built(SIMPLE)[1]
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=DELTA)
    trainer = PrivateTrainer(
        args=arguments(tmp_path), model_init=lambda: built(SIMPLE)[0], train_dataset=data, privacy=privacy
    )
    trainer.train()
    trainer.train()
    assert trainer.engine.ledger.steps == 2


def test_training_ends_before_the_step_that_would_exceed_the_budget(tmp_path, caplog):
    unlimited = private(tmp_path, noise=2.0, per_device_train_batch_size=3, max_steps=5)
    unlimited.train()
    spent = unlimited.engine.get_epsilon(DELTA)
    trainer = private(
        tmp_path, noise=2.0, per_device_train_batch_size=3, max_steps=50, told={"target_epsilon": 1.01 * spent}
    )
    result = trainer.train()
    assert result.global_step == trainer.state.global_step == trainer.engine.ledger.steps == 5
    assert result.metrics["epsilon"] == pytest.approx(spent, rel=1e-3)
    assert "training ends after step 5" in caplog.text
    with pytest.raises(BudgetExceededError):
        trainer.train()
    assert trainer.engine.ledger.steps == 5


@pytest.mark.parametrize(
    "planned", [pytest.param({"max_steps": 7}, marks=pytest.mark.deep), {"max_steps": -1, "num_train_epochs": 3.5}]
)
def test_noise_is_chosen_for_the_planned_steps(planned, tmp_path):
    model, data = built(SIMPLE)
    trainer = PrivateTrainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=3, **planned),
        train_dataset=data,
        privacy=PrivacyArguments(target_epsilon=3.0, target_delta=DELTA),
    )
    trainer.train()
    assert trainer.state.global_step == trainer.engine.ledger.steps == 7
    assert 2.9 < trainer.engine.get_epsilon(DELTA) <= 3.0


def test_a_target_for_an_engine_that_has_spent_already_is_refused(tmp_path):
    first = private(tmp_path, noise=1.0)
    first.train()
    model, data = built(SIMPLE)
    privacy = PrivacyArguments(target_epsilon=3.0, target_delta=DELTA)
    second = PrivateTrainer(model, arguments(tmp_path), train_dataset=data, privacy=privacy, engine=first.engine)
    with pytest.raises(ConfigurationError, match="has steps on its ledger"):
        second.train()


# -- what is logged ---------------------------------------------------------------------------------------------------


def test_epsilon_is_logged_and_the_norm_of_what_has_no_noise_is_not(tmp_path):
    trainer = private(tmp_path, noise=1.0, max_steps=2, logging_steps=1)
    result = trainer.train()
    first, second, last = trainer.state.log_history
    assert 0 < first["epsilon"] < second["epsilon"] == last["epsilon"] == result.metrics["epsilon"]
    assert second["loss"] > 0
    assert not any("grad_norm" in entry for entry in trainer.state.log_history)
    assert trainer.state.total_flos == 0


def test_the_training_loss_can_be_kept_out_of_the_logs(tmp_path):
    trainer = private(tmp_path, noise=1.0, logging_steps=1, told={"log_loss": False})
    assert "train_loss" not in trainer.train().metrics
    assert not any("loss" in key for entry in trainer.state.log_history for key in entry)


def test_the_unit_of_privacy_is_said(tmp_path, caplog):
    private(tmp_path, noise=1.0).train()
    assert "ε is for one example, that is one record of train_dataset (zero_out)" in caplog.text
    assert private(tmp_path, "GPT-2", noise=1.0).engine.ledger.unit.value == "sequence"
    assert private(tmp_path, "GPT-2", noise=1.0, told={"unit": "user"}).engine.ledger.unit.value == "user"


# -- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SIMPLE, "T5"])
def test_evaluation_and_prediction_are_those_of_the_trainer(name, tmp_path):
    trainer = private(tmp_path, name, eval_strategy="steps", eval_steps=1, eval_dataset=built(name)[1])
    trainer.train()
    plain = Trainer(copy.deepcopy(trainer.model), arguments(tmp_path), eval_dataset=trainer.eval_dataset)
    expected = plain.evaluate()["eval_loss"]
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == [pytest.approx(expected, rel=1e-6)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    found, known = (each.predict(trainer.eval_dataset).predictions for each in (trainer, plain))

    def first(value):  # T5 returns its encoder's states too
        return value[0] if isinstance(value, tuple) else value

    assert torch.allclose(torch.tensor(first(found)), torch.tensor(first(known)))


def test_what_was_trained_is_saved_as_ever(tmp_path):
    trainer = private(tmp_path, noise=1.0)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = type(trainer.model).from_pretrained(tmp_path / "saved", dtype=torch.float64)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name


def test_adapters_alone_are_trained_and_saved(tmp_path):
    trainer = private(tmp_path, "LoRA", noise=1.0)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    trainer.model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


def test_a_loss_of_ones_own_is_one_for_each_example(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    trainer = private(tmp_path, compute_loss_func=loss)
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N)


@pytest.mark.deep
def test_low_precision_has_the_same_sum_up_to_its_rounding(tmp_path):
    trainer = private(tmp_path, bf16=True)
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N, tolerance=0.05)


@pytest.mark.deep
def test_activations_that_are_computed_again_give_the_same_sum(tmp_path):
    trainer = private(tmp_path, "GPT-2", activation_checkpointing=True)
    expected = clipped_sum(trainer.model, trainer.train_dataset, 0.1)
    assert_same(moved(trainer), expected, divided_by=N)


def test_a_model_that_generates_in_evaluation_trains_on_what_tokenizers_return(tmp_path):
    model, data = built("T5")
    model.generation_config.max_new_tokens = 4
    args = Seq2SeqTrainingArguments(predict_with_generate=True, **settings_of(tmp_path, max_steps=3))
    trainer = PrivateSeq2SeqTrainer(
        model,
        args,
        train_dataset=data,
        data_collator=lambda rows: BatchEncoding(batch_of(rows)),
        privacy=PrivacyArguments(noise_multiplier=1.0, target_delta=DELTA),
    )
    trainer.train()
    assert trainer.engine.ledger.steps == 3
    assert trainer.predict(data).predictions.shape[0] == N
