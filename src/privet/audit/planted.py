"""Canaries for the audit of a real training: records that are in the data by the toss of a secret coin.

    planted = plant(dataset, count=1000, kind="mislabelled")
    train(model, planted.dataset)                  # as always, by any framework
    audit = planted.audit(planted.losses(model, loss_per_example), delta=1e-5, claimed=engine)

A canary should be a record that a training remembers if it remembers any: one with a wrong label, a blank or random
one, or the user's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from privet._checks import check_count
from privet.audit.canaries import CanaryBook, WithCanaries, marks_of
from privet.audit.training import TrainingAudit
from privet.batches.tree import leaves_in, mapped
from privet.errors import ConfigurationError

__all__ = ["LossPerExample", "Planted", "evaluating", "plant"]

Kind = Literal["mislabelled", "blank", "random"]
LossPerExample = Callable[[nn.Module, Any], Tensor]
_VERSION = 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode inside of this context, and each of its modules back as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


class _Loss(nn.Module):
    """A model and its loss as one module of the batch."""

    def __init__(self, model: nn.Module, loss_per_example: LossPerExample) -> None:
        super().__init__()
        self.model = model
        self._loss = loss_per_example

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


class Planted:
    """Canaries, the coins that say which of them are members, and the data set with those.

    Args:
        dataset: the data set that is trained on.
        records: the canaries.
        members: for each canary, whether it is among the data. A secret until the audit.
        collate: makes a batch of records, as the training's loader does.
    """

    def __init__(
        self,
        dataset: Any,
        records: Sequence[Any],
        members: Sequence[bool],
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self._records = list(records)
        self._members = np.array(members, dtype=bool)
        self._collate = collate
        chosen = [record for record, member in zip(self._records, self._members, strict=True) if member]
        self.dataset = WithCanaries(dataset, chosen)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"<Planted: {len(self)} canaries, each with a coin; {len(self.dataset)} records to train on>"

    # -- scores ------------------------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, loss_per_example: LossPerExample, *, batch_size: int = 256) -> np.ndarray:
        """Returns the loss of each canary under a model, in eval mode and without gradients.

        Args:
            model: as it was trained, or before.
            loss_per_example: `loss(model, batch)` returns the loss of each example, `(B,)`.
            batch_size: how many canaries are run at a time.
        """
        with evaluating(model), torch.no_grad():
            parts = [
                loss_per_example(model, self._collate(self._records[start : start + batch_size])).double().cpu()
                for start in range(0, len(self), check_count("batch_size", batch_size, 1))
            ]
        losses = torch.cat(parts).numpy()
        if losses.shape != (len(self),):
            raise ConfigurationError(
                f"loss_per_example gave losses of shape {losses.shape} for {len(self)} canaries. Expected one number "
                "for each: no reduction over the batch."
            )
        return losses

    @contextmanager
    def aligned(
        self, model: nn.Module, loss_per_example: LossPerExample, *, every: int = 1, chunk: int = 64
    ) -> Iterator[np.ndarray]:
        """Watches a training, and yields scores that are filled in: how far it went along each canary's own gradient.

        It sees every private gradient, as the guarantee allows an adversary to, and forms the gradient of each canary's
        loss at the weights after the step: as much work as a plain step on so many examples.

        Args:
            model: the module that is trained.
            loss_per_example: as for `losses`. It is mapped over examples by `torch.func.vmap`.
            every: looks at one in so many steps.
            chunk: how many gradients are kept at a time.
        """
        check_count("every", every, 1)
        scores = np.zeros(len(self))
        ours = {id(p): name for name, p in model.named_parameters()}
        count = 0

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            nonlocal count
            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if not held or any(id(p) not in ours for p in held):
                return
            count += 1
            if count % every == 0:
                released = {ours[id(p)]: p.grad.detach() for p in held if p.grad is not None}
                scores[:] -= self._alignment(model, loss_per_example, released, chunk)

        handle = register_optimizer_step_post_hook(after)
        try:
            yield scores
        finally:
            handle.remove()

    def _alignment(
        self, model: nn.Module, loss_per_example: LossPerExample, released: dict[str, Tensor], chunk: int
    ) -> np.ndarray:  # (K,)
        """Returns the released gradient's component along each canary's, with the sign of a loss that falls."""
        whole = _Loss(model, loss_per_example)
        fixed = {f"model.{name}": t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
        moving = {f"model.{name}": fixed[f"model.{name}"] for name in released}

        def loss_of(parameters: dict[str, Tensor], record: Any) -> Tensor:
            one = tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, record)
            loss: Tensor = functional_call(whole, {**fixed, **parameters}, (one,)).sum()
            return loss

        gradients = vmap(grad(loss_of), in_dims=(None, 0), randomness="different")
        found = []
        with evaluating(model):  # private training watches a module in training mode only
            for start in range(0, len(self), chunk):
                each = gradients(moving, self._collate(self._records[start : start + chunk]))
                along = sum((each[f"model.{name}"] * g).flatten(1).sum(1).double() for name, g in released.items())
                square = sum(g.flatten(1).square().sum(1).double() for g in each.values())
                found.append(along / torch.as_tensor(square).sqrt().clamp(min=1e-12))
        return np.asarray(torch.cat(found).cpu().numpy())

    # -- the audit ---------------------------------------------------------------------------------------------------

    def audit(
        self,
        scores: Any,
        *,
        delta: float,
        claimed: Any = None,
        confidence: float = 0.95,
        higher_is_member: bool = False,
    ) -> TrainingAudit:
        """Returns what the scores say about ε.

        Args:
            scores: a number for each canary, such as its loss after training, or that less its loss before.
            delta: of the ε that is bounded.
            claimed: what holds the bill of the training (an engine, a step, a ledger), its ε at `delta`, or None.
            confidence: that the lower bounds are not above the truth.
            higher_is_member: whether a high score speaks for a member. A loss is low for members, and so is what
                `aligned` fills in.
        """
        values = np.asarray(scores, dtype=float)
        if values.shape != (len(self),) or not np.isfinite(values).all():
            raise ConfigurationError(
                f"expected a finite score for each of {len(self)} canaries, got shape {values.shape} with "
                f"{int((~np.isfinite(values)).sum())} that are not finite."
            )
        return TrainingAudit.of(
            values if higher_is_member else -values, self._members, delta=delta, claimed=claimed, confidence=confidence
        )

    # -- a training that stops and goes on ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes canaries and coins to a file, so that a training may go on with the same ones. Keep it as a secret."""
        target = Path(path)
        partial = target.with_name(target.name + ".part")
        torch.save({"version": _VERSION, "records": self._records, "members": self._members.tolist()}, partial)
        partial.replace(target)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], dataset: Any, collate: Callable[[list[Any]], Any] = default_collate
    ) -> Planted:
        """Returns the canaries that `save` wrote, for the same data set. Records are read with `weights_only`."""
        state = torch.load(path, weights_only=True)
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise ConfigurationError(f"{path} holds no canaries that this version knows. Expected a file of `save`.")
        return cls(dataset, state["records"], state["members"], collate)


def plant(
    dataset: Any,
    count: int = 1000,
    kind: Kind | Sequence[Any] = "mislabelled",
    *,
    collate: Callable[[list[Any]], Any] = default_collate,
    seed: int | None = None,
) -> Planted:
    """Returns canaries for a data set, each a member by the toss of a fair coin.

    Args:
        dataset: what is trained on; any data set with a length.
        count: how many are tossed for. Ignored where the canaries are given.
        kind: "mislabelled": a record with the label of another class; "blank": zeros, with a label of the data;
            "random": random numbers of the size of the data's, or random tokens of the data; or a list of records.
        collate: as the training's loader makes batches.
        seed: of coins and canaries; for tests. By default nobody knows them.

    Raises:
        ConfigurationError: if two canaries are the same, one of them is among the data already, or there are too few.
    """
    if not len(dataset):
        raise ConfigurationError("the data set is empty. Expected records to make canaries of.")
    coins = torch.Generator()
    if seed is None:
        coins.seed()
    else:
        coins.manual_seed(seed)
    if isinstance(kind, str):
        check_count("count", count, 10)
        records = [_canary(dataset, kind, coins) for _ in range(count)]
    else:
        records = list(kind)
        check_count("the number of canaries", len(records), 10)
    if not isinstance(kind, str) or kind == "random":
        CanaryBook(records)  # raises if two are the same
        _refuse_known(dataset, records)
    members = torch.rand(len(records), generator=coins).lt(0.5).tolist()
    return Planted(dataset, records, members, collate)


def _canary(dataset: Any, kind: str, coins: torch.Generator) -> Any:
    at, other = torch.randint(len(dataset), (2,), generator=coins).tolist()
    record = dataset[at]
    arrays = [leaf for leaf in leaves_in(record) if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim]
    if kind == "mislabelled":
        return _mislabelled(dataset, record, other)
    if kind not in {"blank", "random"}:
        raise ConfigurationError(f"kind must be 'mislabelled', 'blank', 'random' or a list of records, got {kind!r}.")
    if not arrays:
        raise ConfigurationError("the records hold no tensor with an axis. Hand canaries over: kind=[...].")
    first = arrays[0]

    def change(leaf: Any, path: str) -> Any:
        if leaf is not first:
            return leaf
        values = torch.as_tensor(leaf)
        new = torch.zeros_like(values) if kind == "blank" else _random_like(values, dataset, coins)
        return new if isinstance(leaf, Tensor) else new.numpy()

    return mapped(record, change, "the record", afresh=True)


def _random_like(values: Tensor, dataset: Any, coins: torch.Generator) -> Tensor:
    if values.is_floating_point():
        return (torch.randn(values.shape, generator=coins) * float(values.double().std(unbiased=False))).to(values)
    seen = []
    for place in torch.randint(len(dataset), (32,), generator=coins).tolist():
        leaf = next(leaf for leaf in leaves_in(dataset[place]) if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim)
        seen.append(torch.as_tensor(leaf).flatten())
    pool = torch.cat(seen)
    return pool[torch.randint(len(pool), values.shape, generator=coins)].to(values)


def _label_in(record: Any) -> Any:
    """Returns the last leaf that is one whole number."""
    found = [leaf for leaf in leaves_in(record) if _is_label(leaf)]
    if not found:
        raise ConfigurationError(
            "the records hold no label: no leaf is one whole number. Use kind='random' or 'blank', or hand canaries "
            "over: kind=[...]."
        )
    return found[-1]


def _is_label(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.dim() == 0 and not leaf.is_floating_point()
    return isinstance(leaf, int | np.integer) and not isinstance(leaf, bool)


def _mislabelled(dataset: Any, record: Any, other: int) -> Any:
    label = _label_in(record)
    others = (_label_in(dataset[(other + step) % len(dataset)]) for step in range(len(dataset)))
    wrong = next((each for each in others if int(each) != int(label)), None)
    if wrong is None:
        raise ConfigurationError("all labels of the data are the same. Use another kind of canary.")
    return mapped(record, lambda leaf, _: wrong if leaf is label else leaf, "the record", afresh=True)


def _refuse_known(dataset: Any, records: Sequence[Any]) -> None:
    """Raises if a canary is among the data: whether it is a member is no secret then, and no coin decides it."""
    known = set(marks_of(records))
    for place in range(len(dataset)):
        if not known.isdisjoint(marks_of([dataset[place]])):
            raise ConfigurationError(
                f"record {place} of the data set is one of the canaries. Expected canaries that are not in the data: "
                "whether they are must be decided by the coin alone."
            )
