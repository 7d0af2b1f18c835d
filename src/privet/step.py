"""The explicit door: a step that owns the backward, over a loss for each example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from privet._checks import check_positive
from privet.accounting.accountant import Accountant
from privet.accounting.budget import Budget
from privet.accounting.event import Relation, Unit
from privet.accounting.role import LedgerLike
from privet.batches.count import count_examples
from privet.batches.fill import fill_rows
from privet.batches.grow import one_of_zeros
from privet.batches.kept import opening
from privet.batches.tree import tensors_in
from privet.errors import ConfigurationError
from privet.gradients.capture.anew import Anew
from privet.gradients.capture.first_batch import FirstBatch
from privet.gradients.capture.watch import Watch
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.layout import DoubtError
from privet.gradients.passes.two_pass import refuse_several_weights
from privet.gradients.rules.pool import free_idle
from privet.gradients.spread import sum_of_nobody
from privet.gradients.use import Owner
from privet.gradients.weights import groups_of
from privet.mechanism import Mechanism
from privet.noise import NoiseKey, noise_for, noise_key
from privet.parallel import bare
from privet.sampling import PrivateLoader, Users, loader_for
from privet.sampling.partition import with_batch_size
from privet.sampling.physical import PhysicalSize
from privet.training.by_parts import summed_by_parts
from privet.training.checkpoint import File, load, save
from privet.training.clip_count import refuse_adaptive
from privet.training.collective import refuse_options
from privet.training.door import Door, door_ledger
from privet.training.loss_module import LossModule, LossPerExample
from privet.training.once import Making, ended, made_private, refuse_private, take_up
from privet.training.optimizers import refuse_optimizer
from privet.training.parameters import private_parameters
from privet.training.performance import Performance
from privet.training.plausible import refuse_budget_without_noise, warn_of_mechanism
from privet.training.several import Between, release_each
from privet.training.start import facts_of
from privet.training.thawed import admit
from privet.training.update import PrivateUpdate
from privet.training.way import Way
from privet.training.whose import Whose, mark_users, refuse_small, refuse_users
from privet.validation import refuse_mixed_records, refuse_mixing, require_valid

__all__ = ["PrivateStep"]


@final
class PrivateStep(Door):
    """Trains `model` on one logical batch a call.

    Args:
        model: any module; it is left as it is but for a hook on each trainable parameter.
        optimizer: over exactly the model's trainable parameters; any that reads dense gradients once a step.
        mechanism: what each step releases.
        loss_per_example: `loss(model, batch)` returns the loss of each example, `(B,)`, B being axis 0 of the batch's
            first tensor.
        expected_batch_size: the public constant that the noisy sum is divided by. It follows from the mechanism's
            sampling for the batches of `batches(dataset)`; give it for batches of your own.
        performance: how the step is computed; nothing in it changes what is released.
        accountant: `"pld"` (the default, and the tightest), `"rdp"`, `"gdp"`, or an accountant of your own.
        budget: refuses the step that would exceed it.
        relation: the neighbors that ε is about: `"zero_out"` (the default) or `"replace_one"`.
        unit: whose data a row of the batch is: an example's (the default) or, say, a user's.
        ledger: where steps are written, such as a `FileLedger` that several runs share. It has an accountant, a budget,
            a relation and a unit of its own. By default a new `Ledger` in memory.
        secure_mode: whether a reproducible `noise_generator` is refused. Noise is cryptographically secure in any case.
        noise_generator: makes the run reproducible, and says so in the ledger; for tests.

    Guarantees:
        One example, added or removed, moves the sum of one step by at most the clipping's sensitivity, whatever the
        model and the loss, as long as each example's loss depends on that example alone, which is checked on the first
        batch.
        Every step is written to the ledger before its noise is drawn.

    Example:
        >>> import torch
        >>> from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep
        >>> model = torch.nn.Linear(4, 1)
        >>> step = PrivateStep(
        ...     model,
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.1), steps=4),
        ...     loss_per_example=lambda model, batch: model(batch[0]).square().sum(1),
        ... )
        >>> for batch in step.batches(torch.utils.data.TensorDataset(torch.randn(64, 4))):
        ...     losses = step(batch)
        >>> step.epsilon(delta=1e-5) == step.mechanism.epsilon(delta=1e-5)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        mechanism: Mechanism,
        loss_per_example: LossPerExample,
        expected_batch_size: float | None = None,
        performance: Performance | None = None,
        accountant: str | Accountant | None = None,
        budget: Budget | None = None,
        relation: Relation | str | None = None,
        unit: Unit | str | None = None,
        ledger: LedgerLike | None = None,
        secure_mode: bool = False,
        noise_generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(door_ledger(ledger, accountant=accountant, budget=budget, relation=relation, unit=unit))
        ranks, inner = self._ranks_for(model), bare(model)
        with ranks.together():
            if expected_batch_size is not None:
                check_positive("expected_batch_size", expected_batch_size)
            refuse_optimizer(optimizer)
            require_valid(inner)
            performance = Performance() if performance is None else performance
            for name, value, kind in (("mechanism", mechanism, Mechanism), ("performance", performance, Performance)):
                if not isinstance(value, kind):
                    raise ConfigurationError(f"{name} must be a privet.{kind.__name__}, got {type(value).__name__}.")
            mechanism = mechanism.drawn_under(with_batch_size(mechanism.sampling, expected_batch_size))
            if not callable(loss_per_example):
                raise ConfigurationError(
                    f"loss_per_example must be a function of model and batch, got {type(loss_per_example).__name__}."
                )
            refuse_budget_without_noise(mechanism, has_budget=self.budget is not None)
            parameters = private_parameters(inner, optimizer)
            making = Making(self._ledger, watched=False, shares=ranks.share.ranks == 1)
            refuse_private(inner, optimizer, parameters, making)
            groups = groups_of(mechanism.clipping, list(parameters))
            refuse_options(performance, ranks.spread)
            refuse_adaptive(mechanism.clipping, ranks.spread, compiled=performance.compile)
            if performance.passes == 2:
                refuse_several_weights(mechanism.clipping, list(parameters))
            key = noise_key(secure_mode=secure_mode, generator=noise_generator)
        ranks.compare(facts_of(parameters, mechanism=mechanism, optimizer=optimizer, divisor=expected_batch_size))
        key = ranks.key(key)
        self._join_ranks(ranks)
        take_up(inner, self._ledger)
        ranks.begin(model)
        device = next(iter(parameters.values())).device
        self.model, self.optimizer, self.performance, self._making = model, optimizer, performance, making
        if key.predictable:
            self._ledger.mark("reproducible key")
        self._update = PrivateUpdate(
            parameters,
            mechanism=mechanism,
            noise=mechanism.noise.mechanism(noise_for(device, secure_mode=secure_mode, key=key)),
            ledger=self._ledger,
            divisor=expected_batch_size,
            ranks=ranks,
        )
        self._size = PhysicalSize("physical_batch_size", self._physical_size())
        self._loss = LossModule(inner, loss_per_example)
        self._key, self._has_loader = key, False
        self._watch = Watch(
            inner,
            parameters,
            within=self._loss.forward,
            spread=ranks.spread,
            admit=lambda found: admit(inner, self._update, making, found, passes=self._way.passes),
        )
        self._capture = self._watch.capture
        self._way = Way(performance, ranks.spread, self._loss, self._capture, groups)
        self._watch.begin()
        self._first = FirstBatch(
            self._loss,
            self._capture,
            self._watch.tripwires,
            lambda inputs: [self._loss.checked(inputs, count_examples(inputs))],
            also=lambda inputs: refuse_mixing(opening(self._loss, inputs), (inputs,), {}),
            spread=ranks.spread,
        )
        self._anew = Anew(self._capture, functools.partial(self._first.run, whole=True), spread=ranks.spread)
        warn_of_mechanism(mechanism, batch_size=self._update.divisor.value)
        optimizer.zero_grad(set_to_none=True)
        self._update.attach(model, optimizer)
        made_private(inner, optimizer, self._making)

    def detach(self, *, public: bool = False) -> None:
        """Makes model and optimizer ordinary ones again, in place; this step takes no step any more.

        What was billed stays on the ledger, which this object goes on to show. What trains the model from now on is not
        private. It may be made private anew, with a new PrivateStep: give that one `ledger=step.ledger`.

        Args:
            public: says that nothing will ask the private data until the model is made private again. Otherwise, if
                its weights have changed by then, epsilon is infinite.

        Raises:
            ProtocolError: on several ranks, or if it was detached before. Nothing is changed then.
        """
        self._update.detach()
        self._watch.end()
        ended(bare(self.model), self.optimizer, self._making, public=public)

    def _updates(self) -> Sequence[PrivateUpdate]:
        return [self._update]

    def _trained(self) -> Sequence[str]:
        return [type(self.model).__name__]

    def _rows(self) -> list[tuple[str, str]]:
        return [*super()._rows(), ("performance", repr(self.performance)), ("passes", str(self._way.passes))]

    @property
    def mechanism(self) -> Mechanism:
        """Returns what the next step releases."""
        return self._update.mechanism

    def save_checkpoint(self, path: File, *, extra: Mapping[str, Any] | None = None) -> None:
        """Writes model, optimizer, ledger and counters to a path or an open file, without any key.

        A file at the path is replaced at once, and is complete or not there at all.
        """
        model, optimizer = self.model, self.optimizer
        save(path, module=model, optimizer=optimizer, ledger=self.ledger, updates=self._updates(), extra=extra)

    def load_checkpoint(self, path: File) -> dict[str, Any]:
        """Resumes from a path or an open file under the same settings, and returns what was saved as `extra`.

        Loading runs no code from the file. Noise goes on with a fresh key; steps taken here since are still billed.

        Raises:
            ConfigurationError: if the settings differ from those of the saved run. Nothing is changed then.
        """
        return load(path, module=self.model, optimizer=self.optimizer, ledger=self.ledger, updates=self._updates())

    def batches(
        self,
        dataset: Any,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        users: Users | None = None,
    ) -> PrivateLoader:
        """Returns a loader of the planned batches, sampled as the mechanism says, whose steps are billed as such.

        With `users` the sampling draws users, and the gradient of each user is clipped as a whole.

        Raises:
            ConfigurationError: if the expected batch size that was given contradicts the sampling and the dataset.
        """
        refuse_mixed_records(dataset, collate_fn)
        refuse_users(users, self._ledger, without="fixed shapes" if self.performance.fixed_shapes else None)
        refuse_small(users, self._size)
        self._update.refuse_detached("batches() was called")
        sampling = self.mechanism.sampling
        ranks, key = self._update.ranks, self._sampling_key()
        with ranks.together():
            loader = loader_for(
                dataset,
                sampling=sampling,
                key=key,
                steps=self.mechanism.steps if sampling.billed_per == "step" else None,
                collate_fn=collate_fn,
                num_workers=num_workers,
                share=ranks.share,
                users=users,
            )
        ranks.compare({"loader": loader.facts})
        self._update.divisor.learn(loader.dataset_size)
        self._know_records(loader.dataset_size)
        if self._size.most is None and not self._size.auto:
            self._size = PhysicalSize("physical_batch_size", self._physical_size())
        self._update.loaders.follow(loader)
        mark_users(users, self._ledger)
        return loader

    def _physical_size(self) -> int | Literal["auto"] | None:
        """Returns the size of physical batches: that which was given, or one of the expected size."""
        expected, random = self._update.divisor.value, self.mechanism.sampling.random_size
        return self.performance.physical_size(expected, random=random, ranks=self._update.ranks.share.ranks)

    def _sampling_key(self) -> NoiseKey:
        """Returns the step's own key for its first loader, and a fresh one for each further loader."""
        if self._key.predictable or not self._has_loader:
            self._has_loader = True
            return self._key
        return self._update.ranks.key(NoiseKey.fresh())

    def __call__(self, batch: Any) -> Tensor:  # (B,)
        """Takes one step, and returns the examples' losses, detached. They are not private: look, and do not publish.

        Raises:
            ConfigurationError: if the loss is not one number for each example.
            BudgetExceededError: if the step would exceed the budget. It was not taken.
            OutOfMemoryError: if not even a single example fits, with `physical_batch_size="auto"`. It was not taken.
        """
        return self._stepped(batch)

    def several(self, batch: Any, between: Between) -> Tensor:  # (B,)
        """Takes one step after as many releases of the batch as the noise declares (`SeveralReleases`).

        Each is of the weights of then. `between(i)` is called when gradient i, from 0 on, is in `p.grad`, and may move
        the weights; the optimizer steps by the last one. Returns the first losses, and raises what a call raises.
        """
        return self._stepped(batch, between)

    def _stepped(self, batch: Any, between: Between | None = None) -> Tensor:  # (B,)
        receive = functools.partial(self._received, batch)
        losses = receive() if between is None else release_each(self._update, self.optimizer, receive, between)
        try:
            self.optimizer.step()
        except BaseException:
            self._update.discard()
            raise
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _received(self, batch: Any) -> Tensor:  # (B,)
        """Forms the sum of a batch, which waits for its release, and returns the losses."""
        self._loss.begins()
        with (ranks := self._update.ranks).telling():
            examples = count_examples(batch)
            self._update.refuse_detached("a step was called")
            self._update.discard()  # what a step that was interrupted may have left: nothing of it was released
            self._first.trains(self._watch.trains())
            self._watch.tripwires.renew()
            self._update.recognize(tensors_in(batch), anew=True)
            whose = Whose(self._update, examples)
        ranks.spread.require_alike(tensors_in(batch))
        parts = ranks.spread.most(-(-examples // (self._size.most or max(examples, 1))))
        with ranks.running():
            losses, clipped = self._summed(batch, examples, parts, whose)
            self._update.receive(clipped, examples=examples)
        return losses

    def _summed(
        self, batch: Any, examples: int, parts: int = 1, whose: Whose | None = None
    ) -> tuple[Tensor, ClippedSum]:
        """Returns the losses and the clipped sum of a logical batch, of at least so many physical ones."""
        if parts == 0:
            return torch.zeros(0), sum_of_nobody(self._private(), self.mechanism.clipping, self._update.ranks.spread)

        users = Whose(self._update, examples) if whose is None else whose

        def part(rows: Any, start: int, stop: int) -> tuple[Tensor, ClippedSum]:
            return self._part(rows, stop - start, users.owner(start, stop))

        return summed_by_parts(batch, examples, part, least=parts, size=self._size, owner=users.rows)

    def _part(self, batch: Any, examples: int, owner: Owner | None) -> tuple[Tensor, ClippedSum]:
        parameters, policy, size, absent = self._private(), self.mechanism.clipping, max(examples, 1), None
        wanted = self._first.wanted(batch, examples)
        if wanted is not None:
            self._first.run(*wanted)
            # The size that counts is that of physical batches, which is public, and the same on all ranks.
            most = self._size.most or (self._update.divisor.value or examples) / self._update.ranks.share.ranks
            self._way.keep_to_budget(self._first.held * most, groups_of(policy, list(self._update.parameters)))
            if self._way.passes == 2:
                free_idle()  # the check held all uses of the model at once, which no step will
        if examples == 0:  # a part of other ranks alone: one example of zeros goes along, and counts for nothing
            batch = one_of_zeros(batch, axis=0)
        if self.performance.fixed_shapes and self._size.most is not None and size < self._size.most:
            batch, size = fill_rows(batch, self._size.most, examples=size), self._size.most
        if size > examples:
            met = next(iter(self._capture.standing_for(parameters).values()))
            absent = torch.arange(size, device=met.device) >= examples

        def summed() -> tuple[ClippedSum, Tensor]:
            return self._way.engine.clipped_sum(
                lambda inputs: self._loss.checked(inputs, size),
                batch,
                examples=size,
                parameters=parameters,
                policy=policy,
                absent=absent,
                owner=owner,
            )

        self._anew.begins()
        try:
            clipped, losses = summed()
        except DoubtError as doubt:
            if self.performance.compile and doubt.place is not None:  # a graph is looked at once
                raise
            clipped, losses = self._anew.run(batch, size, doubt, summed)
        return losses[:examples], clipped.of_first(examples)

    def _private(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._update.parameters.items() if p.requires_grad}
