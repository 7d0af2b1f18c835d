"""The engine at Opacus's name: wraps module and optimizer, makes the loader private, and counts every step."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from privet.batches.kept import opening
from privet.opacus.accountants import create_accountant
from privet.opacus.accountants.utils import get_noise_multiplier
from privet.opacus.bill import EngineBill, RateBill
from privet.opacus.data_loader import DPDataLoader, private_part
from privet.opacus.declared_loss import DeclaredLoss
from privet.opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from privet.opacus.grad_sample import AbstractGradSampleHooks, AbstractGradSampleModule, GradSampleHooks
from privet.opacus.grad_sample.utils import get_gsm_class, prepare_module
from privet.opacus.modules import trainable_parameters
from privet.opacus.optimizers import DPOptimizer, get_optimizer_class
from privet.opacus.samplers import key_of
from privet.opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from privet.opacus.validators import ModuleValidator
from privet.opacus.warning import warn
from privet.parallel import bare
from privet.sampling.build import privatize_loader
from privet.training.once import Making, refuse_private
from privet.validation import refuse_mixed_records, refuse_mixing

__all__ = ["PrivacyEngine"]


class PrivacyEngine:
    """Makes a module, its optimizer and its loader train with differential privacy, as Opacus's engine does.

    Args:
        accountant: `"prv"`, `"rdp"` or `"gdp"`, or a name that was registered.
        secure_mode: whether noise is cryptographically secure on every device; on CPU it always is. No other package
            is needed for it.

    Example:
        >>> engine, model = PrivacyEngine(), nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(data, batch_size=16),
        ...     noise_multiplier=1.1,
        ...     max_grad_norm=1.0,
        ... )
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(inputs), targets).backward()
        ...     optimizer.step()
        >>> engine.get_epsilon(delta=1e-5) > 0.0
        True
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        self.accountant = create_accountant(accountant)
        self.secure_mode = secure_mode
        self.dataset: Any = None

    # -- the two ways in ---------------------------------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = nn.CrossEntropyLoss(),  # noqa: B008 - Opacus's signature; it is only read
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Returns `(module, optimizer, data_loader)`, and in the mode `"ghost"` the criterion before the loader.

        Args:
            module: the model, in train mode, or a `GradSampleModule` of it.
            optimizer: over parameters of the module.
            criterion: the loss, for the mode `"ghost"`.
            data_loader: of a map-style dataset.
            noise_multiplier: the noise's standard deviation over the clip norm.
            max_grad_norm: the clip norm; a list of one for each parameter with `clipping="per_layer"`.
            batch_first: whether inputs have the batch on axis 0, else on axis 1.
            loss_reduction: whether losses are the mean or the sum over the examples.
            poisson_sampling: whether each batch is drawn afresh at rate 1 / len(data_loader). If not, the loader's
                order is kept and no amplification is claimed: each pass counts as one release on all of the data.
            clipping: `"flat"`, `"per_layer"` or `"adaptive"`.
            noise_generator: makes the noise reproducible, and the run not private; for tests.
            grad_sample_mode: `"hooks"`, `"functorch"`, `"ew"`, `"ghost"` or `"no_op"`.
            wrap_model: whether the module is wrapped. If not, hooks are returned in its place, and you go on using the
                module.
            rand_on_empty: ignored with a warning: an empty batch stays empty.
            **kwargs: of the optimizer's class, such as those of adaptive clipping.

        Raises:
            ValueError: for options that do not fit together, or parameters that are not the module's.
            UnsupportedModuleError: for a module that cannot be trained privately. It is a ValueError.
        """
        if noise_generator is not None and self.secure_mode:
            raise ValueError("Passing seed is prohibited in secure mode: give noise_generator or secure_mode=True.")
        if isinstance(optimizer, DPOptimizer):
            optimizer = optimizer.original_optimizer
        _require_own_parameters(module, optimizer)
        refuse_private(bare(module), optimizer, dict(trainable_parameters(module)), Making(None))
        several = isinstance(module, DifferentiallyPrivateDistributedDataParallel | DistributedDataParallel)
        optimizer_class = get_optimizer_class(clipping, several, grad_sample_mode)
        self.validate(module=module, optimizer=None, data_loader=None)
        refuse_mixed_records(data_loader.dataset, data_loader.collate_fn)
        loader = self._loader(data_loader, poisson=poisson_sampling, several=several, rand_on_empty=rand_on_empty)
        if isinstance(module, DistributedDataParallel):  # its reducer would wait for gradients that never come
            module.require_backward_grad_sync = module.require_forward_param_sync = False
        wrapped = self._wrapped(
            module,
            mode=grad_sample_mode,
            wrap=wrap_model,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            max_grad_norm=max_grad_norm,
        )
        if poisson_sampling:
            wrapped.forbid_grad_accumulation()
        expected = int(len(data_loader.dataset) / len(data_loader))  # type: ignore[arg-type]
        private = optimizer_class(
            optimizer=optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected / dist.get_world_size() if several else expected,
            loss_reduction=loss_reduction,
            generator=noise_generator,
            secure_mode=self.secure_mode,
            **kwargs,
        )
        self._bill(wrapped, private, loader, batch_first=batch_first, sample_rate=1.0 / len(data_loader))
        if grad_sample_mode != "ghost":
            return wrapped, private, loader
        return wrapped, private, DPLossFastGradientClipping(wrapped, private, criterion, loss_reduction), loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = nn.CrossEntropyLoss(),  # noqa: B008 - Opacus's signature; it is only read
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | list[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Does what `make_private` does, with a noise multiplier whose `epochs` cost at most the target."""
        if len(self.accountant) > 0:
            warn(
                "steps were counted by this engine already. The noise is found for a fresh start, so that the whole "
                "run will cost more than the target. Make a new engine for it."
            )
        rate = 1.0 / len(data_loader)
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rate if poisson_sampling else 1.0,
            steps=epochs * (len(data_loader) if poisson_sampling else 1),
            accountant=self.accountant.mechanism(),
        )
        return self.make_private(
            module=module,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            **kwargs,
        )

    def get_epsilon(self, delta: float) -> float:
        """Returns ε at `delta` of every step that was counted."""
        return self.accountant.get_epsilon(delta)

    # -- the parts of make_private -----------------------------------------------------------------------------------

    def _loader(
        self, data_loader: DataLoader[Any], *, poisson: bool, several: bool, rand_on_empty: bool
    ) -> DataLoader[Any]:
        """Returns the private loader."""
        if self.dataset is None:
            self.dataset = data_loader.dataset
        elif self.dataset is not data_loader.dataset:
            warn(
                "PrivacyEngine was given another dataset. All steps are counted on one history, as if on one dataset. "
                "Where the data are of other people, make a new engine."
            )
        if poisson:
            return DPDataLoader.from_data_loader(data_loader, distributed=several, rand_on_empty=rand_on_empty)
        if several:
            raise ValueError("several processes train with Poisson sampling alone: leave poisson_sampling=True.")
        warn(
            "poisson_sampling=False keeps the loader's order, and nothing is amplified by it. Each pass over the data "
            "is counted as one release on all of it, with sample rate 1. Opacus counts sampled steps that were not "
            "taken."
        )
        if private_part(data_loader) is not None:
            return data_loader
        return privatize_loader(data_loader, poisson=False, key=key_of(data_loader.generator, "batches"))

    def _wrapped(self, module: nn.Module, *, mode: str, wrap: bool, **options: Any) -> Any:
        """Returns the wrapped module, or hooks that are attached to it."""
        if wrap and isinstance(module, AbstractGradSampleModule):
            same = all(getattr(module, name) == options[name] for name in ("batch_first", "loss_reduction"))
            if not same or type(module) is not get_gsm_class(mode):
                raise ValueError(
                    f"Pre-existing GradSampleModule doesn't match new arguments: it is a {type(module).__name__} with "
                    f"batch_first={module.batch_first} and loss_reduction={module.loss_reduction!r}. Pass the module "
                    "that it wraps."
                )
            return module
        if mode != "ghost":
            options.pop("max_grad_norm")
        return prepare_module(module, mode, wrap, **options)

    def _bill(
        self,
        wrapped: AbstractGradSampleHooks,
        optimizer: DPOptimizer,
        loader: DataLoader[Any],
        *,
        batch_first: bool,
        sample_rate: float,
    ) -> None:
        """Makes every step of the optimizer counted, and the module tell of its batches."""
        module = wrapped._module  # noqa: SLF001 - Opacus's public name
        named = {name: p for name, p in trainable_parameters(module) if any(p is q for q in optimizer.params)}
        optimizer.name_parameters(named)
        private = private_part(loader)
        if private is None:  # a share of a batch, which nothing announces
            optimizer.bill = RateBill(lambda: self.accountant, sample_rate)
            return
        bill = EngineBill(named, private, lambda: self.accountant, optimizer.original_optimizer)
        optimizer.bill = bill
        if isinstance(wrapped, GradSampleHooks):
            axis = 0 if batch_first else 1
            wrapped.watch_for(
                before=bill.before,
                after=bill.after,
                check=lambda args, kwargs: refuse_mixing(
                    opening(module, (args, kwargs)), args, kwargs, batch_axis=axis
                ),
                losses=DeclaredLoss(mean=wrapped.loss_reduction == "mean", axis=axis),
            )

    # -- models ------------------------------------------------------------------------------------------------------

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> bool:
        """Returns whether the module can be trained privately. The other two are not looked at."""
        return ModuleValidator.is_valid(module)

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> None:
        """Raises UnsupportedModuleError if the module cannot be trained privately. The other two are not looked at."""
        ModuleValidator.validate(module, strict=True)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """Returns a copy of the module in which layers that cannot be trained privately are replaced."""
        return ModuleValidator.fix_and_validate(module)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: MutableMapping[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Writes the states of module, accountant and what else is given to a path or an open file."""
        saved = checkpoint_dict or {}
        saved["module_state_dict"] = module.state_dict(**(module_state_dict_kwargs or {}))
        saved["privacy_accountant_state_dict"] = self.accountant.state_dict()
        for name, part in _named(optimizer, noise_scheduler, grad_clip_scheduler):
            if part is not None:
                saved[name] = part.state_dict()
        torch.save(saved, path, **(torch_save_kwargs or {}))

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Loads what `save_checkpoint` wrote, and returns what else was in it.

        No code of the file is run: `torch_load_kwargs={"weights_only": False}` allows it, for a file that you trust.
        Steps that this engine has counted stay counted.
        """
        loaded = torch.load(path, **{"weights_only": True, **(torch_load_kwargs or {})})
        module.load_state_dict(loaded["module_state_dict"], **(module_load_dict_kwargs or {}))
        self.accountant.load_state_dict(loaded["privacy_accountant_state_dict"])
        for name, part in _named(optimizer, noise_scheduler, grad_clip_scheduler):
            state = loaded.pop(name, None)
            if part is not None and state:
                part.load_state_dict(state)
            elif name == "optimizer_state_dict" and bool(state) != (part is not None):
                warnings.warn(
                    f"the checkpoint {'has' if state else 'lacks'} a state of the optimizer, and load_checkpoint was "
                    f"{'not ' if part is None else ''}given one: it was not loaded.",
                    stacklevel=2,
                )
        return loaded


def _named(optimizer: Any, noise: Any, clip: Any) -> list[tuple[str, Any]]:
    return [
        ("optimizer_state_dict", optimizer),
        ("noise_scheduler_state_dict", noise),
        ("grad_clip_scheduler_state_dict", clip),
    ]


def _require_own_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in module.parameters()}
    held = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    if any(id(p) not in own for p in held):
        raise ValueError(
            "Module parameters are different than optimizer Parameters. Make the optimizer from the parameters of the "
            "module as it is now, after ModuleValidator.fix."
        )
