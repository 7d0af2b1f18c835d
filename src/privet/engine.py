"""The paper's door: two changed lines in an existing script (Yousefpour et al., arXiv 2109.12298)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from privet._checks import check_at_least, check_count, check_positive
from privet.accounting import get_accountant
from privet.accounting.event import Relation
from privet.accounting.ledger import Budget, Ledger
from privet.clipping import ClippingPolicy, policy_for
from privet.errors import ConfigurationError, ProtocolError
from privet.gradients.capture.instrument import Instrument
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded
from privet.gradients.weights import groups_of
from privet.mechanism import Gaussian, Mechanism
from privet.noise import GaussianNoise, noise_for, noise_key
from privet.sampling import privatize_loader
from privet.training.criterion import PrivateCriterion
from privet.training.materialised import Materialised, clear_with_zero_grad
from privet.training.optimizers import refuse_optimizer
from privet.training.parameters import private_parameters
from privet.training.update import PrivateUpdate
from privet.validation import Issue, get_compatible_module, refuse_mixing, require_valid, validate

if TYPE_CHECKING:
    from privet.accounting.accountant import Accountant

__all__ = ["PrivacyEngine"]

_MODES = {"auto": (False, False), "hooks": (True, False), "functorch": (True, True)}
"""By name: whether per-example gradients are shown on the parameters, and whether all of them come from vmap."""

_PRIVATE: weakref.WeakSet[Any] = weakref.WeakSet()


class _Watched:
    """One module made private: its instrument, its update, and the loss that they expect."""

    def __init__(
        self,
        module: nn.Module,
        update: PrivateUpdate,
        *,
        batch_first: bool,
        mean: bool,
        mode: str,
    ) -> None:
        shown, mapped = _MODES[mode]
        self.update = update
        self.materialised = Materialised(update) if shown else None
        self._mean = mean
        self.instrument = Instrument(
            module,
            update.parameters,
            batch_first=batch_first,
            mapped=mapped,
            on_backward=self._received,
            on_check=lambda args, kwargs: refuse_mixing(module, args, kwargs, batch_axis=0 if batch_first else 1),
        )

    def _received(self, recorded: Recorded) -> None:
        if self.instrument.empty:  # the made-up example that kept the structure has no part in the sum
            recorded = Recorded(examples=0)
        examples = recorded.examples or 0
        scale = float(max(examples, 1)) if self._mean else 1.0
        if self.materialised is not None:
            self.materialised.keep(recorded, scale=scale)
            return
        trainable = {name: p for name, p in self.update.parameters.items() if p.requires_grad}
        clipped = clipped_sum(recorded, trainable, self.update.mechanism.clipping, scale=scale)
        self.update.receive(clipped, examples=examples)


class PrivacyEngine:
    """Makes a module, its optimizer and its data loader train with differential privacy, and counts what it costs.

    Args:
        accountant: `"pld"` (tightest), `"rdp"`, `"gdp"`, or an accountant of your own.
        secure_mode: whether noise must be cryptographically secure on every device, at the price of drawing it on the
            host. On CPU it always is.

    ε is for zero-out neighbours: one example is replaced by one that contributes nothing, the number of examples n
    being public. Where `dataset_size` declares a public n, the same figure holds for adding or removing one example.

    One engine has one ledger. Several networks trained on the same data (a GAN) take one `make_private` each, of the
    same engine, and their costs add up.
    """

    def __init__(self, *, accountant: str | Accountant = "pld", secure_mode: bool = False) -> None:
        self._accountant = get_accountant(accountant)
        self._secure_mode = bool(secure_mode)
        self.ledger = Ledger(relation=Relation.ZERO_OUT, accountant=self._accountant)
        self._watched: list[_Watched] = []

    # -- the two ways in ---------------------------------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float],
        criterion: Callable[..., torch.Tensor] | None = None,
        clipping: str | ClippingPolicy = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        batch_first: bool = True,
        poisson_sampling: bool = True,
        dataset_size: int | None = None,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "auto",
    ) -> Any:
        """Returns `(module, optimizer, data_loader)`, and the private criterion as a fourth where one was given.

        Module and optimizer are the very objects that were passed in. The loader is a new one over the same dataset.

        Args:
            module: the model, in the user's own class.
            optimizer: over exactly the module's trainable parameters.
            data_loader: a sequential or shuffling loader of a map-style dataset.
            noise_multiplier: the noise's standard deviation over the sensitivity.
            max_grad_norm: the clip norm C; with `clipping="per_layer"` it may map layers to theirs.
            criterion: returned evaluated per example, whatever its reduction.
            clipping: `"flat"`, `"per_layer"`, `"automatic"`, `"psac"`, or a policy of `privet.clipping` or of your own
                (then `max_grad_norm` must be its sensitivity).
            loss_reduction: whether the loss is the mean or the sum of the examples' losses over the rows of the batch.
            batch_first: whether inputs have the batch on axis 0, else on axis 1.
            poisson_sampling: whether to draw each batch afresh at rate batch_size / n. If not, the loader's own order
                is kept, and no amplification by sampling is claimed.
            dataset_size: a public number to be used in place of `len(dataset)`.
            noise_generator: makes noise and batches reproducible, and says so in the ledger; for tests.
            grad_sample_mode: `"auto"`, the fastest; `"hooks"`, which shows every example's gradient in `p.grad_sample`;
                `"functorch"`, which does so by vmap and without any rule for a layer.

        Raises:
            ConfigurationError: for an option that is out of range, or parameters that do not fit together.
            UnsupportedModelError: for a model whose examples cannot be told apart, with all offenders.
            Either leaves everything as it was.
        """
        noise = Gaussian(check_at_least("noise_multiplier", noise_multiplier))
        policy = policy_for(clipping, max_grad_norm)
        _check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        _check_choice("grad_sample_mode", grad_sample_mode, tuple(_MODES))
        refuse_optimizer(optimizer)
        parameters = private_parameters(module, optimizer)
        self._refuse_private(module, optimizer)
        require_valid(module)
        groups_of(policy, list(parameters))
        key = noise_key(secure_mode=self._secure_mode, generator=noise_generator)
        loader = privatize_loader(data_loader, poisson=poisson_sampling, key=key, dataset_size=dataset_size)
        mechanism = Mechanism(sampling=loader.sampling, clipping=policy, noise=noise)

        device = next(iter(parameters.values())).device
        update = PrivateUpdate(
            parameters,
            mechanism=mechanism,
            noise=GaussianNoise(noise_for(device, secure_mode=self._secure_mode, key=key)),
            ledger=self.ledger,
            divisor=loader.expected_batch_size if loss_reduction == "mean" else 1.0,
            follows_rate=loss_reduction == "mean",
        )
        private_criterion = None
        if criterion is not None:  # what can fail comes before anything is touched
            private_criterion = PrivateCriterion(
                criterion, reduction=loss_reduction, examples=lambda: watched.instrument.examples
            )
        watched = _Watched(
            module, update, batch_first=batch_first, mean=loss_reduction == "mean", mode=grad_sample_mode
        )
        if key.predictable:
            self.ledger.mark("reproducible key")
        update.attach(optimizer)
        optimizer.zero_grad(set_to_none=True)
        optimizer.zero_grad = _guarded(optimizer.zero_grad, watched)  # type: ignore[method-assign]
        if watched.materialised is not None:
            clear_with_zero_grad(module)
        update.follow(loader)
        update.on_forget(watched.instrument.capture.release)
        self._watched.append(watched)
        _PRIVATE.update((module, optimizer))
        returned = (module, optimizer, loader)
        return returned if private_criterion is None else (*returned, private_criterion)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Mapping[str, float],
        criterion: Callable[..., torch.Tensor] | None = None,
        clipping: str | ClippingPolicy = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        batch_first: bool = True,
        poisson_sampling: bool = True,
        dataset_size: int | None = None,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "auto",
    ) -> Any:
        """Returns what `make_private` does, with the least noise whose `epochs` cost at most the target.

        The target becomes the engine's budget: the step that would exceed it raises BudgetExceededError before it is
        taken.

        Raises:
            ConfigurationError: for an option that is out of range, or if steps were taken already.
            AccountingError: if no noise reaches the target.
            Either leaves everything as it was.
        """
        check_positive("target_epsilon", target_epsilon)
        check_count("epochs", epochs, 1)
        if self.ledger.phases:
            raise ConfigurationError(
                "this engine has steps on its ledger, which the target would have to pay for too. Expected a fresh "
                "engine for make_private_with_epsilon. Make a new PrivacyEngine, or use make_private with a "
                "noise_multiplier of your own."
            )
        planned = privatize_loader(data_loader, poisson=poisson_sampling, dataset_size=dataset_size)
        steps = epochs * len(planned) if planned.sampling.billed_per == "step" else epochs
        mechanism = Mechanism(
            sampling=planned.sampling, clipping=policy_for(clipping, max_grad_norm), noise=Gaussian(1.0), steps=steps
        ).calibrated(epsilon=target_epsilon, delta=target_delta, accountant=self._accountant)
        returned = self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=mechanism.noise.multiplier,
            max_grad_norm=max_grad_norm,
            criterion=criterion,
            clipping=clipping,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
            poisson_sampling=poisson_sampling,
            dataset_size=dataset_size,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
        )
        self.set_budget(epsilon=target_epsilon, delta=target_delta)
        return returned

    # -- what it costs -----------------------------------------------------------------------------------------------

    def get_epsilon(self, delta: float) -> float:
        """Returns ε at `delta` of everything released so far through this engine."""
        return self.ledger.epsilon(delta)

    def set_budget(self, *, epsilon: float, delta: float) -> None:
        """Makes the step that would exceed the budget raise BudgetExceededError before it is taken."""
        self.ledger.budget = Budget(epsilon, delta)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Returns what the next step of each private module releases."""
        return tuple(watched.update.mechanism for watched in self._watched)

    # -- models ------------------------------------------------------------------------------------------------------

    @staticmethod
    def validate(module: nn.Module) -> list[Issue]:
        """Returns everything in the module that cannot be trained privately, with what takes its place."""
        return validate(module)

    @staticmethod
    def is_compatible(module: nn.Module) -> bool:
        """Returns whether `validate` finds nothing."""
        return not validate(module)

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """Returns a copy of the module in which the offending layers are replaced."""
        return get_compatible_module(module)

    def _refuse_private(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for thing in (module, optimizer):
            if thing in _PRIVATE:
                raise ProtocolError(
                    f"this {type(thing).__name__} was made private before: its gradients would be clipped and noised "
                    "twice. Expected one make_private for each module. Build a new module and optimizer, or go on "
                    "with the ones that make_private returned."
                )
        inside = [name for name, child in module.named_modules() if name and child in _PRIVATE]
        if inside:
            raise ProtocolError(
                f"parts of the module were made private before: {', '.join(inside)}. Make one of the two private."
            )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, path: Any, *, module: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes model, optimizer, ledger and counters to a file, which replaces an older one at once.

        No key is in it.
        """
        from privet.training.checkpoint import save

        save(path, module=module, optimizer=optimizer, ledger=self.ledger, updates=self._updates(module), extra=extra)

    def load_checkpoint(self, path: Any, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Resumes from a file under the same settings, and returns what was saved as `extra`.

        Loading runs no code from the file. Noise goes on with a fresh key; steps taken here since are still billed.

        Raises:
            ConfigurationError: if the settings differ from those of the saved run.
        """
        from privet.training.checkpoint import load

        return load(path, module=module, optimizer=optimizer, ledger=self.ledger, updates=self._updates(module))

    def _updates(self, module: nn.Module) -> list[PrivateUpdate]:
        ours = {id(p) for p in module.parameters()}
        found = [w.update for w in self._watched if any(id(p) in ours for p in w.update.parameters.values())]
        if not found:
            raise ProtocolError(
                "this module is not private here. Call make_private first, with the settings of the saved run."
            )
        return found


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _guarded(zero_grad: Callable[..., None], watched: _Watched) -> Callable[..., None]:
    def guarded(set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's own signature
        watched.update.refuse_zero_grad()
        zero_grad(set_to_none=set_to_none)
        if watched.materialised is not None:
            watched.materialised.clear()

    return guarded
