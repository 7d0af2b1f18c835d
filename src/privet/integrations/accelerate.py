"""Private training in a loop of your own with Accelerate: one call in the place of `accelerator.prepare`.

    model, optimizer, loader = prepare(
        accelerator,
        engine,
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
    )
    scheduler, evaluation = accelerator.prepare(scheduler, evaluation)  # everything else, as ever

`accumulate`, `backward`, `save_state` and `load_state` are those of Accelerate. The ledger rides in the optimizer's
state; where the loader is in its pass is saved beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from privet.engine import PrivacyEngine
from privet.errors import ConfigurationError, ProtocolError
from privet.integrations.arguments import PrivateArguments, loader_of_all
from privet.integrations.needed import need
from privet.sampling import BatchTicket, PrivateLoader

need("accelerate", "1.0", extra="huggingface")

from accelerate import Accelerator  # noqa: E402 - after the line that says what to install
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import GradientState  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402

__all__ = ["PreparedLoader", "prepare"]

M = TypeVar("M", bound=nn.Module)
_SHARDED = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"}


@final
class PreparedLoader:
    """The batches of a private loader, on the accelerator's device. None is read ahead.

    It is no DataLoader, so that nothing builds it anew from its parts, and `accelerator.prepare` leaves it as it is.

    Args:
        loader: the private loader.
        accelerator: whose device and accumulation it follows.
    """

    def __init__(self, loader: PrivateLoader, accelerator: Accelerator) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self.end_of_dataloader = False  # this and `remainder` are asked by Accelerate of the loader that is running
        self.remainder = -1
        self._accelerator = accelerator
        loader.on_batch(self._announced)

    def _announced(self, ticket: BatchTicket) -> None:
        self.end_of_dataloader = ticket.ends_pass and ticket.last

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        accelerator, state = self._accelerator, GradientState()
        accelerator.step = 0  # a pass that was left early may have ended inside of a logical batch; this one begins one
        self.end_of_dataloader = False
        state._add_dataloader(self)  # noqa: SLF001 - what its own loaders do, by which `accumulate` knows the end
        try:
            for batch in self.loader:
                yield send_to_device(batch, accelerator.device) if accelerator.device_placement else batch
        finally:
            state._remove_dataloader(self)  # noqa: SLF001

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.loader.load_state_dict(state)

    @property
    def batch_sampler(self) -> NoReturn:
        """Raises ProtocolError: `skip_first_batches` would build a loader of it, whose batches nobody bills."""
        raise ProtocolError(
            "the sampler of a private loader was asked for, as accelerate.skip_first_batches does to build another "
            "loader. Expected the loader as it is. accelerator.load_state puts it back to where it was, in the middle "
            "of a pass too: leave skip_first_batches away."
        )

    sampler = batch_sampler


def prepare(
    accelerator: Accelerator,
    engine: PrivacyEngine,
    *,
    module: M,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    epochs: int | None = None,
    **options: Any,
) -> tuple[M, AcceleratedOptimizer, PreparedLoader]:
    """Makes model and optimizer private, prepares them for the accelerator, and returns them with a private loader.

    Args:
        accelerator: the Accelerator. Its `gradient_accumulation_steps` become virtual steps.
        engine: counts what it costs.
        module: the model, as `accelerator.prepare` would be given it.
        optimizer: likewise.
        data_loader: likewise. Its `batch_size` is that of one process, unless the accelerator has `split_batches`;
            under Poisson sampling it is the expected one. A step is of as many examples on average, times the number of
            processes, times `gradient_accumulation_steps`.
        noise_multiplier: the noise's standard deviation over the sensitivity.
        target_epsilon: in its place: what `epochs` may cost, which becomes the budget.
        target_delta: δ of the target.
        epochs: the passes that the target is for.
        options: all other options of `PrivacyEngine.make_private`, such as `max_grad_norm`.

    Raises:
        TypeError: for an option that `make_private` does not have.
        ConfigurationError: for a setting of the accelerator that private training does not go with, for something that
            was prepared before, and as `make_private` says. Nothing is changed then, but that the model is on the
            accelerator's device.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from privet import PrivacyEngine
        >>> from privet.integrations.accelerate import prepare
        >>> accelerator, engine, model = Accelerator(cpu=True), PrivacyEngine(), torch.nn.Linear(4, 1)
        >>> dataset = torch.utils.data.TensorDataset(torch.randn(64, 4))
        >>> model, optimizer, loader = prepare(
        ...     accelerator,
        ...     engine,
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=torch.utils.data.DataLoader(dataset, batch_size=16),
        ...     noise_multiplier=1.1,
        ...     max_grad_norm=1.0,
        ... )
        >>> for (inputs,) in loader:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(model(inputs).square().mean())
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> engine.ledger.steps
        4
    """
    arguments = PrivateArguments(
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        epochs=epochs,
        options=options,
    )
    _refuse_accelerator(accelerator)
    _refuse_prepared(module, optimizer, data_loader)
    if "accumulate" in options:
        raise ConfigurationError(
            "accumulate= is what Accelerator(gradient_accumulation_steps=...) says. Leave accumulate= away."
        )
    if accelerator.device_placement:
        module.to(accelerator.device)
    ranks = 1 if accelerator.split_batches else accelerator.num_processes
    loader = arguments.make_private(
        engine,
        module=module,
        optimizer=optimizer,
        data_loader=loader_of_all(data_loader, ranks=ranks, poisson=options.get("poisson_sampling", True)),
        epochs=None,
        accumulate=accelerator.gradient_accumulation_steps,
        grad_scaler=accelerator.scaler,
    )
    # "Evaluation" leaves DistributedDataParallel away, whose reducer would wait for gradients that never come.
    prepared, stepping = (
        accelerator.prepare_model(module, evaluation_mode=True),
        accelerator.prepare_optimizer(optimizer),
    )
    for each in (prepared, stepping):
        each._is_accelerate_prepared = True  # noqa: SLF001 - so that accelerator.prepare returns it as it is
    feed = PreparedLoader(loader, accelerator)
    accelerator.register_for_checkpointing(feed)
    return prepared, stepping, feed


def _refuse_accelerator(accelerator: Accelerator) -> None:
    """Raises for settings that private training does not go with."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _SHARDED:
        raise ConfigurationError(
            f"the accelerator is set to {kind}. Expected one process, or several with a replica of the model each. For "
            "sharded models use privet with fully_shard, in a loop without Accelerate (docs/distributed.md)."
        )
    if accelerator.mixed_precision == "fp8":
        raise ConfigurationError("mixed_precision='fp8' was never tried here. Expected 'no', 'bf16' or 'fp16'.")
    if accelerator.gradient_accumulation_steps > 1 and not accelerator.gradient_state.sync_with_dataloader:
        raise ConfigurationError(
            "the GradientAccumulationPlugin has sync_with_dataloader=False. Every pass begins with a new logical batch "
            "here. Leave it at its default."
        )


def _refuse_prepared(module: Any, optimizer: Any, data_loader: Any) -> None:
    """Raises for what accelerator.prepare has made: the plain objects are expected."""
    found = {
        "module": isinstance(module, DistributedDataParallel) or getattr(module, "_is_accelerate_prepared", False),
        "optimizer": isinstance(optimizer, AcceleratedOptimizer),
        "data_loader": getattr(data_loader, "_is_accelerate_prepared", False)
        or isinstance(data_loader, PreparedLoader)
        or type(data_loader).__module__.startswith("accelerate."),
    }
    before = [name for name, prepared in found.items() if prepared]
    if before:
        raise ConfigurationError(
            f"{', '.join(before)}: prepared before. Expected what you would give accelerator.prepare, for here it is "
            "made private first. Call privet.integrations.accelerate.prepare in the place of accelerator.prepare for "
            "model, optimizer and training loader, and accelerator.prepare for all others."
        )
