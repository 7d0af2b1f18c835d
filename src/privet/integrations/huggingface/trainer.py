"""transformers' Trainer with differential privacy: the same calls, and one more argument.

Guarantees
----------
Every step is taken on a batch of the private loader, which draws `per_device_train_batch_size` times
`gradient_accumulation_steps` examples on average, and is cut into as many parts as gradients are accumulated over. The
loss is one for each example. The optimizer steps on private gradients alone, and its state carries the ledger into the
Trainer's own checkpoints, so that a resumed run knows what was spent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from privet.clipping import policy_for
from privet.engine import PrivacyEngine
from privet.errors import ConfigurationError, ProtocolError
from privet.integrations.huggingface.arguments import PrivacyArguments
from privet.integrations.huggingface.budget import EndsWithBudget
from privet.integrations.huggingface.families import Family
from privet.integrations.huggingface.installed import Seq2SeqTrainer, Trainer
from privet.integrations.huggingface.losses import family_of, model_inputs, per_example_loss
from privet.integrations.huggingface.neighbors import refuse_neighbors
from privet.integrations.huggingface.options import refuse_collator, refuse_launcher, refuse_options, refuse_samplers
from privet.integrations.huggingface.own_loss import refuse_other_loss
from privet.integrations.huggingface.read_ahead import ReadAhead, loader_of
from privet.mechanism import Gaussian, Mechanism
from privet.sampling import BatchTicket, privatize_loader
from privet.training.accumulate import Accumulate
from privet.training.update import PrivateUpdate, update_of

__all__ = ["PrivateSeq2SeqTrainer", "PrivateTrainer"]

_LOG = logging.getLogger(__name__)
_NOT_PRIVATE = ("loss", "train_loss")  # in the logs, and computed from the data without noise
_OF_EVALUATION = ("eval_", "test_")
_COMPARISONS = 8  # batches whose first example may have no labels


class PrivateTrainer(Trainer):
    """A Trainer that trains with differential privacy.

    It takes what `transformers.Trainer` takes, and:

    Args:
        privacy: the guarantee.
        engine: an engine of your own, such as one whose ledger several runs share. It has accountant, unit and
            `secure_mode` itself. By default a new one.

    `compute_loss_func`, if it is given, has to return one number for each example, of shape (B,).

    Attributes:
        engine: the privacy engine, with the ledger: `trainer.engine.get_epsilon(delta=1e-5)`.

    Raises:
        ConfigurationError: for options of TrainingArguments under which the guarantee would not hold, all at once.
        UnsupportedModelError: for a model whose loss cannot be computed for each example.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        privacy: PrivacyArguments,
        engine: PrivacyEngine | None = None,
        **options: Any,
    ) -> None:
        given: object = privacy
        if not isinstance(given, PrivacyArguments):
            raise ConfigurationError(
                f"privacy must be PrivacyArguments, got {type(given).__name__}. Write "
                "privacy=PrivacyArguments(target_epsilon=8.0, target_delta=1e-5, max_grad_norm=1.0)."
            )
        refuse_samplers(type(self))
        if args is not None:
            refuse_options(args, privacy)
        super().__init__(model, args, *rest, **options)
        refuse_options(self.args, privacy)
        refuse_launcher(self.accelerator)
        refuse_collator(self.data_collator)
        self.privacy = privacy
        self._family: Family | None = None if self.compute_loss_func is not None else family_of(self._module)
        self.engine = engine or PrivacyEngine(
            accountant=privacy.accountant, unit=privacy.unit or self._usual_unit(), secure_mode=privacy.secure_mode
        )
        self._private: torch.optim.Optimizer | None = None  # the optimizer that was made private last
        self._batches: ReadAhead | None = None
        self._comparisons = _COMPARISONS  # with the model's own loss that are still to be tried
        self._examples: int | None = None  # in the part at hand
        self._losses: list[tuple[Tensor, int]] = []  # of the parts of the step at hand, with their examples
        self.add_callback(EndsWithBudget(lambda: self.engine, self._next_event))

    @property
    def _module(self) -> nn.Module:
        """Returns the model. The Trainer replaces it where it has a model_init."""
        assert self.model is not None
        return self.model

    def _usual_unit(self) -> str:
        return "example" if self._family is None else self._family.unit.value

    # -- what is trained on, and with ----------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes model and optimizer private, and returns the optimizer. The Trainer calls it several times."""
        super().create_optimizer(*args, **kwargs)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        if optimizer is not self._private:
            self._make_private(optimizer)
        return self.optimizer

    def _make_private(self, optimizer: torch.optim.Optimizer) -> None:
        if self.train_dataset is None:
            raise ConfigurationError("PrivateTrainer trains on train_dataset, and there is none. Give train_dataset=.")
        loader, privacy = self._ordinary_loader(), self.privacy
        clipping: Any = privacy.clipping  # a word, which is checked inside
        if self._family is not None:
            refuse_neighbors(self._module, loader.dataset, loader.collate_fn)
        noise = privacy.noise_multiplier
        if noise is None:
            noise = self._calibrated(loader)
        _, _, private = self.engine.make_private(
            module=self._module,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=privacy.max_grad_norm,
            clipping=clipping,
            accumulate=self._accumulate,
            grad_scaler=self.accelerator.scaler,
        )
        if privacy.target_epsilon is not None:
            self.engine.set_budget(epsilon=privacy.target_epsilon, delta=privacy.target_delta)
        self._private = optimizer
        self._batches = ReadAhead(private)
        self._say_what_is_protected()

    @property
    def _accumulate(self) -> Accumulate:
        """Returns how many parts a step has. The mean loss of each is not divided by their number."""
        return Accumulate(self.args.gradient_accumulation_steps, divided=False)

    def _ordinary_loader(self) -> DataLoader[Any]:
        """Returns a loader of the training data, with the options of the user's."""
        args = self.args
        dataset: Any = self.train_dataset
        if hasattr(dataset, "remove_columns"):  # one of the datasets library
            dataset, collator = self._remove_unused_columns(dataset, description="training"), self.data_collator
        else:
            collator = self._get_collator_with_removed_columns(self.data_collator, description="training")
        workers = args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )

    def _calibrated(self, loader: DataLoader[Any]) -> float:
        """Returns the least noise with which the planned steps meet the target."""
        privacy, engine = self.privacy, self.engine
        assert privacy.target_epsilon is not None
        if engine.ledger.phases:
            raise ConfigurationError(
                "the engine has steps on its ledger, which target_epsilon would have to pay for too. Expected a fresh "
                "engine where noise is chosen for a target. Give noise_multiplier= as well, or leave engine= away."
            )
        planned = privatize_loader(loader, accumulate=self._accumulate.batches)
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * planned.steps_per_pass)
        mechanism = Mechanism(
            sampling=planned.sampling,
            clipping=policy_for(privacy.clipping, privacy.max_grad_norm),
            noise=Gaussian(1.0),
            steps=steps,
        ).calibrated(
            epsilon=privacy.target_epsilon,
            delta=privacy.target_delta,
            accountant=engine.accountant,
            relation=engine.ledger.relation,
        )
        multiplier: float = mechanism.noise.multiplier
        return multiplier

    def _say_what_is_protected(self) -> None:
        ledger = self.engine.ledger
        _LOG.warning(
            "privet: ε is for one %s, that is one record of train_dataset (%s). A document, or a person, with several "
            "records has less protection: ask engine.ledger.epsilon(delta, group_size=K).%s",
            ledger.unit.value,
            ledger.relation.value,
            " The training loss in the logs gets no noise and is not private." if self.privacy.log_loss else "",
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the parts of private batches, as many for each step as gradients are accumulated over."""
        self.create_optimizer()
        assert self._batches is not None
        return loader_of(self._batches)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _update(self) -> PrivateUpdate:
        return update_of(self._private)

    def _next_event(self) -> Any:
        return self._update().mechanism.event(1)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains. It ends before the step that would exceed the budget. See `transformers.Trainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._losses.clear()
            if self._private is not None:
                self._update().forget()  # of a step that was left in the middle nothing is kept

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Adds the clipped gradients of one part of a batch to the secret sum, and returns the loss for the log.

        `num_items_in_batch`, the tokens of the whole batch, is ignored: it would let an example rescale the others.
        """
        model.train()
        begin = getattr(self.optimizer, "train", None)  # of optimizers without a schedule
        if callable(begin):
            begin()
        if self._batches is None:
            raise ProtocolError("training_step() was called before train(). Expected the training loop of train().")
        ticket = self._batches.announce()
        self._examples = ticket.size
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        scaler = self.accelerator.scaler  # of fp16
        (loss if scaler is None else scaler.scale(loss)).backward()
        return self._logged(loss.detach(), ticket)

    def _logged(self, loss: Tensor, ticket: BatchTicket) -> Tensor:
        """Returns 0 for all parts of a step but the last, and then the mean over the examples of the step."""
        if ticket.first:
            self._losses.clear()
        self._losses.append((loss, ticket.size))
        if not ticket.last:
            return torch.zeros_like(loss)
        examples = sum(size for _, size in self._losses)
        # A step without examples has no loss: the Trainer takes the mean of those before for NaN.
        return torch.stack([part * size for part, size in self._losses if size] or [loss * math.nan]).sum() / max(
            examples, 1
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of the Trainer
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the mean of the losses of each example; in evaluation, what the Trainer returns."""
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        outputs, losses = self._losses_of(model, inputs)
        loss = losses.mean() if losses.shape[0] else losses.sum()
        return (loss, outputs) if return_outputs else loss

    def _losses_of(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Returns the outputs of the model, and the loss of each example."""
        if self._family is None:
            rest = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**rest)
            assert self.compute_loss_func is not None
            losses = self.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None)
            if not isinstance(losses, Tensor) or losses.shape != (self._examples,):
                found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ConfigurationError(
                    f"compute_loss_func returned {found} for {self._examples} examples. Expected one loss for each "
                    f"example, of shape ({self._examples},), which one example alone decides. Use reduction='none', "
                    "and take the mean over all axes but the first."
                )
            return outputs, losses
        self._compare_once(model, inputs)
        outputs = model(**model_inputs(model, inputs))
        smoothing = self.args.label_smoothing_factor
        return outputs, per_example_loss(model, outputs, inputs, label_smoothing=smoothing)

    def _compare_once(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        if self._comparisons:
            self._comparisons = 0 if refuse_other_loss(model, inputs) else self._comparisons - 1

    # -- what is logged ------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs ε beside the loss of training. The norm of gradients is left away: it would be of what has no noise."""
        if self._private is not None and not any(key.startswith(_OF_EVALUATION) for key in logs):
            logs.pop("grad_norm", None)
            if not self.privacy.log_loss:
                for key in _NOT_PRIVATE:
                    logs.pop(key, None)
            logs["epsilon"] = self.engine.get_epsilon(self.privacy.target_delta)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Returns 0: operations are counted by the sizes of batches, which are secret."""
        return 0

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: to choose the best of several runs on the data costs more than any of them."""
        raise ConfigurationError(
            "hyperparameter_search chooses the best of several trainings on the same data, and its choice tells of the "
            "data too. Expected a choice that is accounted for. Use privet.tuning (docs/tuning.md), or choose on "
            "public data."
        )


class PrivateSeq2SeqTrainer(PrivateTrainer, Seq2SeqTrainer):
    """A `PrivateTrainer` that can generate in evaluation, as transformers' Seq2SeqTrainer does."""
