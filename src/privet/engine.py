"""The paper's door: two changed lines in an existing script (Yousefpour et al., arXiv 2109.12298)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Unpack, final, overload

import torch
from torch import nn
from torch.utils.data import DataLoader

from privet._checks import check_choice, check_target_delta
from privet.accounting.accountant import Accountant
from privet.accounting.budget import Budget
from privet.accounting.event import Relation, Unit
from privet.accounting.role import LedgerLike
from privet.clipping import policy_for
from privet.gradients.weights import groups_of
from privet.mechanism import Mechanism
from privet.noise import Noise, noise_for, noise_key
from privet.parallel import bare
from privet.sampling import PrivateLoader, Sampling, Users, privatize_loader
from privet.training.accumulate import Accumulate, accumulate_for
from privet.training.clip_count import refuse_adaptive
from privet.training.criterion import PrivateCriterion
from privet.training.door import door_ledger
from privet.training.loss_scale import check_scaler
from privet.training.models import AboutModels
from privet.training.module_door import ModuleDoor
from privet.training.once import Making, made_private, refuse_private, take_up
from privet.training.optimizers import refuse_optimizer
from privet.training.options import Clipping, Options, noise_of
from privet.training.parameters import private_parameters
from privet.training.plausible import refuse_budget_without_noise, warn_of_mechanism
from privet.training.private_module import MODES_ELSEWHERE, GradSampleMode, PrivateModule, modes
from privet.training.start import facts_of
from privet.training.target import multiplier_for
from privet.training.update import PrivateUpdate
from privet.training.whose import mark_users, refuse_users
from privet.validation import refuse_mixed_records, require_valid

__all__ = ["PrivacyEngine"]

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - M and O: a module and an optimizer of the user's own class


@final
class PrivacyEngine(ModuleDoor, AboutModels):
    """Makes a module, its optimizer and its data loader train with differential privacy, and counts what it costs.

    Args:
        accountant: `"pld"` (the default, and the tightest), `"rdp"`, `"gdp"`, or an accountant of your own.
        secure_mode: whether a reproducible `noise_generator` is refused. Noise is cryptographically secure in any case.
        budget: refuses the step that would exceed it.
        relation: the neighbors that ε is about: `"zero_out"` (the default) or `"replace_one"`.
        unit: whose data a row of the batch is: an example's (the default) or, say, a user's.
        ledger: where steps are written, such as a `FileLedger` that several runs share. It has an accountant, a budget,
            a relation and a unit of its own. By default a new `Ledger` in memory.

    ε is for zero-out neighbors by default: one example is replaced by one that contributes nothing, the number of
    examples n being public. Where `dataset_size` declares a public n, the same figure holds for adding or removing one.

    One engine has one ledger. Several networks trained on the same data (a GAN) take one `make_private` each, of the
    same engine, and their costs add up.

    Example:
        >>> import torch
        >>> from privet import PrivacyEngine
        >>> engine, model = PrivacyEngine(), torch.nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        ...     noise_multiplier=1.1,
        ...     max_grad_norm=1.0,
        ... )
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        ...     optimizer.step()
        >>> engine.get_epsilon(delta=1e-5) > 0.0
        True
    """

    def __init__(
        self,
        *,
        accountant: str | Accountant | None = None,
        secure_mode: bool = False,
        budget: Budget | None = None,
        relation: Relation | str | None = None,
        unit: Unit | str | None = None,
        ledger: LedgerLike | None = None,
    ) -> None:
        super().__init__(door_ledger(ledger, accountant=accountant, budget=budget, relation=relation, unit=unit))
        self._secure_mode = bool(secure_mode)

    # -- the two ways in ---------------------------------------------------------------------------------------------

    @overload
    def make_private(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: None = None,
        **options: Unpack[Options],
    ) -> tuple[M, O, PrivateLoader]: ...

    @overload
    def make_private(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: Callable[..., torch.Tensor],
        **options: Unpack[Options],
    ) -> tuple[M, O, PrivateLoader, PrivateCriterion]: ...

    def make_private(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: Callable[..., torch.Tensor] | None = None,
        clipping: Clipping = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        batch_first: bool = True,
        poisson_sampling: bool = True,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        dataset_size: int | None = None,
        accumulate: int | Accumulate = 1,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: GradSampleMode = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
        users: Users | None = None,
    ) -> tuple[M, O, PrivateLoader] | tuple[M, O, PrivateLoader, PrivateCriterion]:
        """Makes the module and the optimizer private, in place, and returns them with a private loader.

        Returns `(module, optimizer, data_loader)`, and the private criterion as a fourth where one was given. Module
        and optimizer are the very objects that were passed in. The loader is a new one over the same dataset.

        Args:
            module: the model, in the user's own class.
            optimizer: over exactly the module's trainable parameters.
            data_loader: a sequential or shuffling loader of a map-style dataset.
            noise_multiplier: the noise's standard deviation over the sensitivity.
            max_grad_norm: the clip norm C; with `clipping="per_layer"` it may map layers to theirs.
            criterion: returned evaluated per example, whatever its reduction.
            clipping: `"flat"`, `"per_layer"`, `"automatic"`, `"psac"`, or a policy of `privet.clipping` or of your
                own, which has its clip norm itself: then leave `max_grad_norm` away.
            loss_reduction: whether the loss is the mean or the sum of the examples' losses over the rows of the batch.
            batch_first: whether inputs have the batch on axis 0, else on axis 1.
            poisson_sampling: whether to draw each batch afresh at rate batch_size / n. If not, the loader's own order
                is kept, and no amplification by sampling is claimed.
            sampling: another way of forming batches in its place, such as one of your own.
            noise: another noise than Gaussian, such as `DiscreteGaussian` or `BandMF`; its multiplier becomes
                `noise_multiplier`.
            dataset_size: a public number to be used in place of `len(dataset)`, under Poisson sampling.
            accumulate: how many of the loader's batches make a logical batch, for a loop with `(loss / k).backward()`
                on each, and `step()` and `zero_grad()` on every k-th. They are the k parts of one batch drawn at k
                times the rate. `Accumulate(k, divided=False)` is for a loop that does not divide its mean losses.
            noise_generator: makes noise and batches reproducible, and says so in the ledger; for tests.
            grad_sample_mode: `"auto"`, the fastest; `"hooks"`, which shows every example's gradient in `p.grad_sample`;
                `"functorch"`, which does so by vmap and without any rule for a layer.
            grad_scaler: what the loop scales the loss with, for float16. Its scale becomes a constant, and cancels.
            users: whose records are whose, to make a user the unit of privacy, with an engine of `unit="user"`: users
                are drawn, `batch_size` and `dataset_size` count users, and each user's gradient is clipped as a whole.

        Raises:
            ConfigurationError: for an option that is out of range, or parameters that do not fit together.
            UnsupportedModelError: for a model whose examples cannot be told apart, with all offenders.

        An error leaves everything as it was.
        """
        noise = noise_of(noise, noise_multiplier)
        shown = None if grad_sample_mode == "auto" else f"grad_sample_mode={grad_sample_mode!r}"
        refuse_users(users, self._ledger, without=shown)
        policy = policy_for(clipping, max_grad_norm)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice("grad_sample_mode", grad_sample_mode, modes(), elsewhere=MODES_ELSEWHERE)
        parts, scaler = accumulate_for(accumulate, mode=grad_sample_mode), check_scaler(grad_scaler)
        ranks, inner = self._ranks_for(module, grad_sample_mode), bare(module)
        with ranks.together():
            refuse_optimizer(optimizer)
            parameters = private_parameters(inner, optimizer)
            shares = ranks.share.ranks == 1 and grad_sample_mode == "auto"
            making = Making(self._ledger, watched=True, shares=shares)
            refuse_private(inner, optimizer, parameters, making)
            require_valid(inner)
            refuse_mixed_records(getattr(data_loader, "dataset", None), getattr(data_loader, "collate_fn", None))
            groups_of(policy, list(parameters))
            refuse_adaptive(policy, ranks.spread)
            key = noise_key(secure_mode=self._secure_mode, generator=noise_generator)
        key = ranks.key(key)
        mean = loss_reduction == "mean"
        with ranks.together():
            loader = privatize_loader(
                data_loader,
                poisson=poisson_sampling,
                sampling=sampling,
                key=key,
                dataset_size=dataset_size,
                share=ranks.share,
                accumulate=parts.batches,
                users=users,
            )
            mechanism = Mechanism(sampling=loader.sampling, clipping=policy, noise=noise)
            refuse_budget_without_noise(mechanism, has_budget=self.budget is not None)
            divisor = loader.expected_batch_size if mean else 1.0
            facts = facts_of(parameters, mechanism=mechanism, optimizer=optimizer, divisor=divisor)
        ranks.compare({**facts, "loader": loader.facts})
        self._join_ranks(ranks)

        device = next(iter(parameters.values())).device
        update = PrivateUpdate(
            parameters,
            mechanism=mechanism,
            noise=noise.mechanism(noise_for(device, secure_mode=self._secure_mode, key=key)),
            ledger=self.ledger,
            divisor=divisor,
            follows_rate=mean,
            batch_size=loader.expected_batch_size,
            ranks=ranks,
            parts=parts.batches,
        )
        private_criterion = None
        if criterion is not None:  # what can fail comes before anything is touched
            private_criterion = PrivateCriterion(
                criterion,
                reduction=loss_reduction,
                examples=lambda: watched.instrument.examples,
                on_losses=lambda losses: watched.losses.trust(losses),  # noqa: PLW0108 - it is made below
            )
        take_up(inner, self._ledger)
        ranks.begin(module)
        watched = PrivateModule(
            inner,
            update,
            batch_first=batch_first,
            loss_divisor=parts.loss_divisor if mean else None,
            making=making,
            mode=grad_sample_mode,
            expects_criterion=criterion is not None,
            grad_scaler=scaler,
        )
        if key.predictable:
            self.ledger.mark("reproducible key")
        watched.attach(optimizer)
        update.loaders.follow(loader)
        mark_users(users, self._ledger)
        self._watched.append(watched)
        made_private(inner, optimizer, making)
        self._know_records(loader.dataset_size)
        warn_of_mechanism(mechanism, batch_size=loader.expected_batch_size)
        if private_criterion is None:
            return module, optimizer, loader
        return module, optimizer, loader, private_criterion

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: None = None,
        **options: Unpack[Options],
    ) -> tuple[M, O, PrivateLoader]: ...

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: Callable[..., torch.Tensor],
        **options: Unpack[Options],
    ) -> tuple[M, O, PrivateLoader, PrivateCriterion]: ...

    def make_private_with_epsilon(
        self,
        *,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Mapping[str, float] | None = None,
        criterion: Callable[..., torch.Tensor] | None = None,
        clipping: Clipping = "flat",
        loss_reduction: Literal["mean", "sum"] = "mean",
        batch_first: bool = True,
        poisson_sampling: bool = True,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        dataset_size: int | None = None,
        accumulate: int | Accumulate = 1,
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: GradSampleMode = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
        users: Users | None = None,
    ) -> tuple[M, O, PrivateLoader] | tuple[M, O, PrivateLoader, PrivateCriterion]:
        """Does what `make_private` does, with the least noise whose `epochs` cost at most the target.

        The target becomes the engine's budget: the step that would exceed it raises BudgetExceededError before it is
        taken.

        Raises:
            ConfigurationError: for an option that is out of range, or if steps were taken already.
            AccountingError: if no noise reaches the target.

        An error leaves everything as it was.
        """
        check_target_delta("target_delta", target_delta)
        planned = privatize_loader(
            data_loader,
            poisson=poisson_sampling,
            sampling=sampling,
            dataset_size=dataset_size,
            accumulate=accumulate_for(accumulate, mode=grad_sample_mode).batches,
            users=users,
        )
        self._know_records(planned.dataset_size)
        self._ask_about("target_delta", target_delta)
        multiplier = multiplier_for(
            self.ledger,
            planned,
            policy_for(clipping, max_grad_norm),
            noise,
            epochs=epochs,
            epsilon=target_epsilon,
            delta=target_delta,
        )
        returned = self.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=multiplier,
            max_grad_norm=max_grad_norm,
            criterion=criterion,
            clipping=clipping,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
            poisson_sampling=poisson_sampling,
            sampling=sampling,
            noise=noise,
            dataset_size=dataset_size,
            accumulate=accumulate,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            grad_scaler=grad_scaler,
            users=users,
        )
        self.set_budget(epsilon=target_epsilon, delta=target_delta)
        return returned
