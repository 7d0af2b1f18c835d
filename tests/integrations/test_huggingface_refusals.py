"""Options, collators, models and packages with which a PrivateTrainer would not keep its promise."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from privet import ConfigurationError, PrivacyEngine, ProtocolError, UnsupportedModelError
from privet.integrations import needed
from privet.integrations.huggingface import PrivacyArguments, PrivateTrainer, installed, per_example_loss
from privet.integrations.huggingface.options import refuse_launcher, refuse_options
from tests.integrations.huggingface_models import N, batch_of, built

PRIVACY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5, max_grad_norm=0.5)


def arguments(path, **options):
    return TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=3, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", **options,
    )  # fmt: skip


def trainer(path, name="classes", *, kind=PrivateTrainer, privacy=PRIVACY, model=None, args=None, **options):
    usual, data = built(name)
    return kind(model or usual, args or arguments(path), **{"train_dataset": data, **options}, privacy=privacy)


OPTIONS = {
    "train_sampling_strategy": ("group_by_length", "at 'random'"),
    "max_grad_norm": (0.3, r"PrivacyArguments\(max_grad_norm="),
    "auto_find_batch_size": (True, "gradient_accumulation_steps for less memory"),
    "dataloader_drop_last": (True, "none is left over"),
    "torch_compile": (True, "a compiled model hides"),
    "use_liger_kernel": (True, "fused kernels hide"),
    "neftune_noise_alpha": (5.0, "one long example sets for all others"),
    "include_num_input_tokens_seen": ("all", "which is secret"),
    "optim": ("lomo", "steps inside of the backward"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_breaks_the_guarantee_is_refused_with_what_to_write(name, tmp_path):
    value, words = OPTIONS[name]
    args = arguments(tmp_path)
    setattr(args, name, value)  # some need a package, or a device, to be given to TrainingArguments
    with pytest.raises(ConfigurationError, match=f"{name}: .*{words}"):
        trainer(tmp_path, args=args)


@pytest.mark.parametrize(
    ("name", "value"),
    [("group_by_length", True), ("past_index", 2), ("sortish_sampler", True), ("fsdp", True), ("deepspeed", "x.json")],
)
def test_options_of_other_versions_and_of_several_processes_are_refused(name, value, tmp_path):
    args = arguments(tmp_path)
    vars(args)[name] = value
    with pytest.raises(ConfigurationError, match=f"{name}: "):
        refuse_options(args, PRIVACY)


@pytest.mark.parametrize(("name", "words"), [("world_size", "several processes"), ("n_gpu", "several devices")])
def test_several_processes_and_devices_are_refused(name, words, tmp_path):
    class Spread:
        world_size = n_gpu = 1

        def __getattr__(self, other):
            return getattr(args, other)

    args, spread = arguments(tmp_path), Spread()
    setattr(spread, name, 2)
    with pytest.raises(ConfigurationError, match=words):
        refuse_options(spread, PRIVACY)


def test_the_defaults_are_not_refused(tmp_path):
    refuse_options(arguments(tmp_path), PRIVACY)
    refuse_options(arguments(tmp_path, max_grad_norm=0.5), PRIVACY)
    refuse_options(arguments(tmp_path, max_grad_norm=0.0), PRIVACY)


def test_all_options_are_named_at_once(tmp_path):
    args = arguments(tmp_path, auto_find_batch_size=True, dataloader_drop_last=True)
    with pytest.raises(
        ConfigurationError, match=r"with 2 of the options.*auto_find_batch_size: .*dataloader_drop_last"
    ):
        trainer(tmp_path, args=args)


@pytest.mark.parametrize("name", ["_get_train_sampler", "get_train_dataloader"])
def test_samplers_of_ones_own_are_refused(name, tmp_path):
    kind = type("Own", (PrivateTrainer,), {name: lambda self, *args: None})
    with pytest.raises(ConfigurationError, match=f"Own overrides {name}"):
        trainer(tmp_path, kind=kind)


def test_a_collator_that_makes_one_row_of_all_is_refused(tmp_path):
    from transformers import DataCollatorWithFlattening

    with pytest.raises(ConfigurationError, match="puts all examples of a batch into one row"):
        trainer(tmp_path, data_collator=DataCollatorWithFlattening())


def test_a_loss_that_a_model_adds_to_its_own_is_refused(tmp_path):
    plain, _ = built("GPT-2")

    class GPT2LMHeadModel(type(plain)):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            output = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            if output.loss is not None:
                output.loss = output.loss + 0.5
            return output

    model = GPT2LMHeadModel(plain.config).double()
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel computes another loss than that of causal"):
        trainer(tmp_path, "GPT-2", model=model).train()


def test_a_loss_of_ones_own_that_is_reduced_is_refused(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    with pytest.raises(ConfigurationError, match=r"compute_loss_func returned \(\) for \d examples"):
        trainer(tmp_path, compute_loss_func=loss).train()


def test_a_loss_of_ones_own_for_each_token_is_refused(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="none")

    with pytest.raises(ConfigurationError, match=r"Expected one loss for each example, of shape \(\d,\)"):
        trainer(tmp_path, "tokens", compute_loss_func=loss).train()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"deepspeed_plugin": object()}, "deepspeed_plugin"),
        ({"fsdp_plugin": object()}, "fsdp_plugin"),
        ({"dynamo_plugin": SimpleNamespace(backend="DynamoBackend.INDUCTOR")}, "dynamo_backend"),
        ({"mixed_precision": "fp8"}, "mixed_precision=fp8"),
    ],
)
def test_what_a_launcher_configured_is_refused(state, words):
    with pytest.raises(ConfigurationError, match=words):
        refuse_launcher(SimpleNamespace(state=SimpleNamespace(**state)))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(built("classes")[1])


def test_what_is_not_given_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="privacy must be PrivacyArguments, got dict"):
        trainer(tmp_path, privacy={"noise_multiplier": 1.0})
    with pytest.raises(ConfigurationError, match=r"there is none\. Give train_dataset="):
        trainer(tmp_path, train_dataset=None).train()
    with pytest.raises(ConfigurationError, match="IterableDataset, from which no example can be drawn"):
        trainer(tmp_path, train_dataset=Stream()).train()
    with pytest.raises(ConfigurationError, match="dataset is empty"):
        trainer(tmp_path, train_dataset=[]).train()
    with pytest.raises(ConfigurationError, match="hyperparameter_search chooses the best"):
        trainer(tmp_path).hyperparameter_search()
    with pytest.raises(ProtocolError, match="before train"):
        trainer(tmp_path).training_step(torch.nn.Linear(1, 1), {})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "neither noise_multiplier nor target_epsilon"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"target_epsilon": 0.0}, "target_epsilon"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, "target_delta"),
        ({"noise_multiplier": 1.0, "unit": "town"}, "unit must be one of 'example'"),
    ],
)
def test_a_guarantee_out_of_range_is_refused(wrong, words):
    with pytest.raises(ConfigurationError, match=words):
        PrivacyArguments(**{"target_delta": 1e-5, **wrong})


def test_the_guarantee_is_read_from_a_command_line():
    from transformers import HfArgumentParser

    line = ["--target_delta", "1e-6", "--target_epsilon", "3", "--max_grad_norm", "0.1", "--log_loss", "false"]
    (found,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(line)
    assert found == PrivacyArguments(target_delta=1e-6, target_epsilon=3.0, max_grad_norm=0.1, log_loss=False)


@pytest.mark.parametrize("found", ["none", "4.45.2"])
def test_a_package_that_is_missing_or_too_old_is_said_in_one_line(found, monkeypatch):
    if found == "none":
        monkeypatch.setattr(needed.importlib.util, "find_spec", lambda package: None)
    else:
        monkeypatch.setattr(needed.importlib, "import_module", lambda package: SimpleNamespace(__version__=found))
    wanted = r"needs transformers 4.46 or newer here, and found .*: pip install 'privet\[hugg"
    with pytest.raises(ImportError, match=wanted) as e:
        importlib.reload(installed)
    assert "\n" not in str(e.value)


def test_labels_outside_of_the_trainer_are_refused_with_the_way_on():
    model, data = built("GPT-2")
    model, _, loader = PrivacyEngine().make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    (batch,) = loader
    with pytest.raises(UnsupportedModelError, match=r"privet\.integrations\.huggingface"):
        model(**batch)
    assert per_example_loss(model, model(input_ids=batch["input_ids"]), batch_of(data)).shape == (N,)
