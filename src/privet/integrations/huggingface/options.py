"""Options of TrainingArguments under which the guarantee would not hold, or that would do nothing, and what to write.

option                                                             why it is refused
train_sampling_strategy, group_by_length, sortish_sampler          batches are not drawn at random
max_grad_norm                                                      it clips the batch's gradient, after the noise
auto_find_batch_size                                               the sampling rate would change in mid-run
dataloader_drop_last                                               no batch is left over
torch_compile, use_liger_kernel                                    gradients of each example cannot be captured
neftune_noise_alpha                                                its scale is set by the longest example of a batch
include_num_input_tokens_seen                                      it logs the secret size of each batch
past_index                                                         batches share a state
deepspeed, fsdp, several processes, several devices in one         not supported by this trainer
optim of the LOMO and layer-wise kinds                             they step in the backward, before any noise
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from privet.errors import ConfigurationError
from privet.integrations.huggingface.arguments import PrivacyArguments

__all__ = ["refuse_collator", "refuse_launcher", "refuse_options", "refuse_samplers"]

_DEFAULT_NORM = 1.0  # of TrainingArguments: what is there if its user said nothing


def refuse_options(args: Any, privacy: PrivacyArguments) -> None:
    """Raises ConfigurationError if an option of TrainingArguments would break the guarantee; it names all of them."""
    found = [f"{name}: {words}" for name, broken, words in _RULES if broken(args, privacy)]
    if found:
        raise ConfigurationError(
            f"PrivateTrainer cannot train with {len(found)} of the options in TrainingArguments. " + " ".join(found)
        )


def _set(name: str, default: Any) -> Callable[[Any, PrivacyArguments], bool]:
    """Returns whether an option that this version of transformers has differs from its default."""
    return lambda args, privacy: getattr(args, name, default) not in (default, None)


def _other_norm(args: Any, privacy: PrivacyArguments) -> bool:
    return args.max_grad_norm not in (None, 0, _DEFAULT_NORM, privacy.max_grad_norm)


def _steps_in_backward(args: Any, privacy: PrivacyArguments) -> bool:
    name = str(getattr(args.optim, "value", args.optim))
    return "lomo" in name or "layerwise" in name


_RULES: tuple[tuple[str, Callable[[Any, PrivacyArguments], bool], str], ...] = (
    (
        "train_sampling_strategy",
        _set("train_sampling_strategy", "random"),
        (
            "batches would be chosen by length or order, and ε is for batches that are drawn at random. Leave it at "
            "'random'."
        ),
    ),
    (
        "group_by_length",
        _set("group_by_length", default=False),
        "batches would be chosen by length, and ε is for batches that are drawn at random. Set group_by_length=False.",
    ),
    (
        "sortish_sampler",
        _set("sortish_sampler", default=False),
        "batches would be chosen by length, and ε is for batches that are drawn at random. Set sortish_sampler=False.",
    ),
    (
        "max_grad_norm",
        _other_norm,
        (
            "it clips the gradient of the batch after the noise, and protects nobody. Leave it away, and write "
            "PrivacyArguments(max_grad_norm=...), which clips the gradient of each example before the noise."
        ),
    ),
    (
        "auto_find_batch_size",
        _set("auto_find_batch_size", default=False),
        (
            "the batch size sets the sampling rate, which ε is computed for, and would change in mid-run. Choose "
            "per_device_train_batch_size, and gradient_accumulation_steps for less memory."
        ),
    ),
    (
        "dataloader_drop_last",
        _set("dataloader_drop_last", default=False),
        "each batch is drawn anew from all examples, so that none is left over to drop. Leave it away.",
    ),
    (
        "torch_compile",
        _set("torch_compile", default=False),
        "a compiled model hides the operations from which each example's gradient is taken. Leave it away.",
    ),
    (
        "use_liger_kernel",
        _set("use_liger_kernel", default=False),
        "its fused kernels hide the operations from which each example's gradient is taken. Leave it away.",
    ),
    (
        "neftune_noise_alpha",
        _set("neftune_noise_alpha", None),
        (
            "the scale of its noise follows from the padded length of the batch, which one long example sets for all "
            "others. Leave it away."
        ),
    ),
    (
        "include_num_input_tokens_seen",
        lambda args, privacy: getattr(args, "include_num_input_tokens_seen", "no") not in (False, None, "no"),
        "it logs how many tokens were sampled, which is secret. Leave it away.",
    ),
    (
        "past_index",
        lambda args, privacy: (getattr(args, "past_index", -1) or -1) >= 0,
        "a state would go from one batch to the next, so that an example is in later steps too. Leave it away.",
    ),
    (
        "optim",
        _steps_in_backward,
        "this optimizer steps inside of the backward, before anything is clipped or noised. Write optim='adamw_torch'.",
    ),
    (
        "deepspeed",
        _set("deepspeed", None),
        "it owns the gradients, which have to be clipped for each example. Leave it away.",
    ),
    (
        "fsdp",
        lambda args, privacy: bool(getattr(args, "fsdp", None)),
        (
            "PrivateTrainer trains in one process. Write a loop with PrivacyEngine, which trains fully_shard models "
            "(docs/distributed.md)."
        ),
    ),
    (
        "several processes",
        lambda args, privacy: args.world_size > 1,
        (
            "PrivateTrainer trains in one process. Write a loop with PrivacyEngine, which trains on several ranks "
            "(docs/distributed.md), or start one process."
        ),
    ),
    (
        "several devices in one process",
        lambda args, privacy: args.n_gpu > 1,
        "nn.DataParallel copies the model at every forward. Let this process see one device: CUDA_VISIBLE_DEVICES=0.",
    ),
)


def refuse_launcher(accelerator: Any) -> None:
    """Raises ConfigurationError if a launcher, beside TrainingArguments, chose what the guarantee does not hold for."""
    state = accelerator.state
    found = [name for name in ("deepspeed_plugin", "fsdp_plugin") if getattr(state, name, None) is not None]
    backend = str(getattr(getattr(state, "dynamo_plugin", None), "backend", "NO"))
    if not backend.upper().endswith("NO"):
        found.append(f"dynamo_backend={backend}")
    if str(getattr(state, "mixed_precision", "no")) not in {"no", "bf16", "fp16"}:
        found.append(f"mixed_precision={state.mixed_precision}")
    if found:
        raise ConfigurationError(
            f"accelerate was configured with {', '.join(found)}, with which PrivateTrainer cannot clip the gradient of "
            "each example. Expected one process, without compilation, in single precision, bf16 or fp16. Start the "
            "script with python, or change the configuration of accelerate launch."
        )


def refuse_samplers(kind: type) -> None:
    """Raises ConfigurationError if a subclass of the Trainer has a way of its own to choose batches."""
    for name in ("_get_train_sampler", "get_train_dataloader"):
        owner = next((each for each in kind.__mro__ if name in vars(each)), None)
        if owner is not None and not owner.__module__.startswith(("transformers.", "privet.")):
            raise ConfigurationError(
                f"{owner.__name__} overrides {name}, and ε is for batches that PrivateTrainer draws at random. Remove "
                "it. Weigh examples in the loss instead, with public weights."
            )


def refuse_collator(collator: Any) -> None:
    """Raises ConfigurationError for a collator that puts all examples of a batch into one row."""
    if "Flattening" in type(collator).__name__:
        raise ConfigurationError(
            f"{type(collator).__name__} puts all examples of a batch into one row, so that nobody can tell whose a "
            "gradient is. Expected one row for each example. Pad instead, as DataCollatorForLanguageModeling does, or "
            "pack sequences before training: then one packed sequence is what ε is for."
        )
