"""Private statistics of the data, on the ledger of the training: a quantile to clip by, moments to normalize by.

Each is one Gaussian release (or several that cost together what one does) of a bounded sum over examples, each of which
adds a bounded amount that depends on that example alone. The number of examples is public, as in training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from privet._checks import check_at_least, check_count, check_positive, check_probability
from privet.accounting.event import GaussianEvent, Relation
from privet.accounting.role import LedgerLike, check_ledger
from privet.batches.count import count_examples
from privet.batches.cut import cut_rows
from privet.errors import ConfigurationError
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import GaussianNoise, noise_for, noise_key
from privet.parallel import bare
from privet.parallel.mesh import refuse_ranks
from privet.training.once import called_by_user

__all__ = ["Moments", "norm_quantile", "private_moments", "private_quantile"]

_UP = 1.0 + 2.0**-48
"""What the noise of each of several releases is rounded up by, so that together they cost no more than is billed."""


def private_quantile(
    values: Tensor,  # (n,)
    quantile: float,
    *,
    low: float,
    high: float,
    noise_multiplier: float,
    ledger: LedgerLike,
    queries: int = 10,
    noise_generator: torch.Generator | None = None,
) -> float:
    """Bills a release, and returns a private quantile of one value for each example.

    It is a binary search on the scale of logarithms: `queries` times, the number of values at most x is released with
    noise, and half of the interval stays. Counts are recentred, `sum(1[v <= x] - 1/2)`, so that one example moves each
    by 1/2 (as in Andrew et al., 2021, arXiv:1905.03871). All counts together cost one Gaussian of `noise_multiplier`:
    the noise on each has standard deviation `noise_multiplier * sqrt(queries) / 2`, in examples.

    Args:
        values: one for each example, which no other example may have influenced. NaN counts as above everything.
        quantile: the share of values that should be at most the result.
        low: the least result; a public number above 0.
        high: the largest one.
        noise_multiplier: of all counts together.
        ledger: where it is billed, before any noise is drawn: `engine.ledger`, or the ledger that a step will get.
        queries: how often the interval is halved. Ten take a range of 1e6 to steps of 1.4 %.
        noise_generator: makes the noise reproducible, and says so in the ledger; for tests.

    Raises:
        ConfigurationError: for values that are not one for each example, options out of range, or several ranks.
        BudgetExceededError: if it would exceed the ledger's budget. Nothing was released.

    Example:
        >>> import torch
        >>> from privet import Ledger
        >>> norms, ledger = torch.rand(10_000), Ledger(relation="zero_out")
        >>> median = private_quantile(norms, 0.5, low=1e-3, high=1e3, noise_multiplier=10.0, ledger=ledger)
        >>> 0.3 < median < 0.7
        True
    """
    given: object = values
    if not isinstance(given, Tensor) or given.dim() != 1 or not len(given):
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ConfigurationError(f"values must be a tensor with one value for each example, (n,), got {found}.")
    share, queries = check_probability("quantile", quantile), check_count("queries", queries, 1)
    low, high = check_positive("low", low), check_positive("high", high)
    if low >= high:
        raise ConfigurationError(f"low must be below high, got {low:g} and {high:g}.")
    values = values.detach().cpu()
    release = _Release(ledger, noise_multiplier, noise_generator, parts=queries)
    for _ in range(queries):
        middle = math.sqrt(low) * math.sqrt(high)
        count = (values <= middle).sum(dtype=torch.float64) - 0.5 * len(values)
        noisy = float(release(count.reshape(1), sensitivity=0.5))
        low, high = (middle, high) if noisy / len(values) + 0.5 < share else (low, middle)
    return math.sqrt(low) * math.sqrt(high)


def norm_quantile(
    model: nn.Module,
    loss_per_example: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    quantile: float = 0.5,
    low: float = 1e-3,
    high: float = 1e3,
    noise_multiplier: float,
    ledger: LedgerLike,
    queries: int = 10,
    noise_generator: torch.Generator | None = None,
) -> float:
    """Bills a release, and returns a private quantile of the norms of the examples' gradients: a first clip norm.

    Each example's norm is computed by a backward of its own, on a copy of the model, so that a part of the data is
    enough. Call it before the model is made private, on one process. The norms themselves are not shown.

    Args:
        model: the model as training will begin with it.
        loss_per_example: `loss(model, batch)` returns the loss of each example, as for `PrivateStep`.
        batches: batches in which each example is once.
        quantile: the share of examples that should not be clipped.
        low: see `private_quantile`, as for the other arguments.
        high: see there.
        noise_multiplier: see there.
        ledger: see there.
        queries: see there.
        noise_generator: see there.

    Raises:
        ConfigurationError: for a model that is private already, or see `private_quantile`.
        BudgetExceededError: if it would exceed the ledger's budget. Nothing was released.
    """
    if called_by_user(model):
        raise ConfigurationError(
            "norm_quantile was given a model that is private already, whose forwards belong to training. Expected the "
            "model before make_private. Call it first, with the ledger of the engine."
        )
    # A copy, because a forward may write into the model what it saw of an example: running statistics, say.
    model = copy.deepcopy(bare(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms: list[Tensor] = []
    for batch in batches:
        examples = count_examples(batch)
        for i in range(examples):
            one = cut_rows(batch, i, i + 1, examples=examples)
            loss = loss_per_example(model, one).sum()
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, parameters, allow_unused=True)
            squares = [g.double().square().sum() for g in gradients if g is not None]
            norms.append(torch.stack(squares).sum().sqrt().cpu() if squares else torch.zeros((), dtype=torch.float64))
    return private_quantile(
        torch.stack(norms) if norms else torch.zeros(0),
        quantile,
        low=low,
        high=high,
        noise_multiplier=noise_multiplier,
        ledger=ledger,
        queries=queries,
        noise_generator=noise_generator,
    )


@final
@dataclass(frozen=True)
class Moments:
    """The mean and the standard deviation of each feature, private.

    Attributes:
        mean: `(F,)`.
        deviation: `(F,)`; at least a thousandth of half of the feature's range.
    """

    mean: Tensor
    deviation: Tensor

    def normalize(self, x: Tensor) -> Tensor:  # (rows, F, ...)
        """Returns features less their mean, over their deviation."""
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        return (x - self.mean.to(x).view(shape)) / self.deviation.to(x).view(shape)


def private_moments(
    data: Tensor | Iterable[Tensor],  # (n, F, ...)
    *,
    low: float | Tensor,
    high: float | Tensor,
    noise_multiplier: float,
    ledger: LedgerLike,
    noise_generator: torch.Generator | None = None,
) -> Moments:
    """Bills a release, and returns the private mean and deviation of each feature, to normalize by.

    Features are on axis 1; axes behind it, such as the pixels of a channel, are averaged within each example. Values
    are clamped to [low, high] and moved to u in [-1, 1]. An example adds u and u^2 - 1/2 for each of F features, whose
    norm is at most sqrt(1.25 F): that is the sensitivity. An example with a value that is not finite adds nothing.

    Args:
        data: one row for each example, or batches of such rows, in which each example is once.
        low: public lower ends of the features, one number or `(F,)`.
        high: public upper ends.
        noise_multiplier: the standard deviation of the noise over the sensitivity.
        ledger: where it is billed, before any noise is drawn: `engine.ledger`, or the ledger that a step will get.
        noise_generator: makes the noise reproducible, and says so in the ledger; for tests.

    Raises:
        ConfigurationError: for data without rows of features, or bounds that are not finite or not in order.
        BudgetExceededError: if it would exceed the ledger's budget. Nothing was released.

    Example:
        >>> import torch
        >>> from privet import Ledger
        >>> pictures, ledger = torch.rand(2_000, 3, 8, 8), Ledger(relation="zero_out")
        >>> moments = private_moments(pictures, low=0.0, high=1.0, noise_multiplier=5.0, ledger=ledger)
        >>> moments.normalize(pictures).mean().abs() < 0.3
        tensor(True)
    """
    total, examples, half, middle = None, 0, torch.zeros(0), torch.zeros(0)
    for rows in [data] if isinstance(data, Tensor) else data:
        if not isinstance(rows, Tensor) or rows.dim() < 2 or not rows.shape[1]:
            found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ConfigurationError(f"data must be tensors of examples and features, (n, F, ...), got {found}.")
        if total is None:
            half, middle = _range(low, high, rows.shape[1])
            total = torch.zeros(2, rows.shape[1], dtype=torch.float64)
        if rows.shape[1] != total.shape[1]:
            raise ConfigurationError(
                f"batches have {total.shape[1]} and {rows.shape[1]} features. Expected one number."
            )
        total += _contributions(rows, half, middle).sum(0)
        examples += len(rows)
    if total is None or not examples:
        raise ConfigurationError("data has no example. Expected at least one row.")
    release = _Release(ledger, noise_multiplier, noise_generator)
    noisy = release(total, sensitivity=math.sqrt(1.25 * total.shape[1])) / examples
    first, second = noisy[0].clamp(-1.0, 1.0), noisy[1] + 0.5
    spread = (second - first.square()).clamp(min=1e-6).sqrt().clamp(max=1.0)
    return Moments(mean=(middle + half * first).float(), deviation=(half * spread).float())


def _range(low: float | Tensor, high: float | Tensor, features: int) -> tuple[Tensor, Tensor]:  # (F,), (F,)
    """Returns half of the range of each feature, and its middle."""
    ends = [torch.as_tensor(end, dtype=torch.float64).cpu().expand(features) for end in (low, high)]
    if not all(bool(end.isfinite().all()) for end in ends) or not bool((ends[0] < ends[1]).all()):
        raise ConfigurationError(
            f"low and high must be finite, and low below high for each feature, got {low!r} and {high!r}. Give public "
            "bounds: what a pixel can be, or what is plausible. Values outside are clamped."
        )
    return (ends[1] - ends[0]) / 2, (ends[1] + ends[0]) / 2


def _contributions(rows: Tensor, half: Tensor, middle: Tensor) -> Tensor:  # -> (n, 2, F)
    """Returns what each example adds: a vector of norm sqrt(1.25 F) at most, as a mean of such vectors has."""
    wide = rows.detach().cpu().double().flatten(2) if rows.dim() > 2 else rows.detach().cpu().double().unsqueeze(2)
    unit = ((wide - middle[:, None]) / half[:, None]).clamp(-1.0, 1.0)
    found = torch.stack([unit.mean(2), unit.square().mean(2) - 0.5], 1)
    finite = wide.isfinite().flatten(1).all(1)
    return torch.where(finite[:, None, None], found, 0.0)


class _Release:
    """Bills one Gaussian release, which may come in several parts, and adds the noise to each.

    Args:
        ledger: where it is written at once.
        multiplier: of all parts together.
        generator: for reproducible noise.
        parts: how many there are. Each has noise that is sqrt(parts) times larger.
    """

    def __init__(
        self, ledger: LedgerLike, multiplier: float, generator: torch.Generator | None, *, parts: int = 1
    ) -> None:
        multiplier = check_at_least("noise_multiplier", multiplier)
        ledger = check_ledger(ledger)
        refuse_ranks("a private statistic")
        if getattr(ledger, "relation", Relation.ADD_OR_REMOVE_ONE) is Relation.ADD_OR_REMOVE_ONE:
            raise ConfigurationError(
                "a private statistic takes the number of examples as public, and the ledger is about neighbors of "
                "another number (add_or_remove_one). Expected relation='zero_out' or 'replace_one'. Nothing was "
                "released."
            )
        key = noise_key(secure_mode=False, generator=generator)
        if key.predictable:
            ledger.mark("reproducible key")
        ledger.begin(GaussianEvent(multiplier))
        self._noise = GaussianNoise(noise_for("cpu", secure_mode=False, key=key))
        self._multiplier, self._left, self._step = multiplier * math.sqrt(parts) * _UP, parts, 0

    def __call__(self, total: Tensor, *, sensitivity: float) -> Tensor:
        """Returns the sum with noise."""
        assert self._left > 0
        step, self._step, self._left = self._step, self._step + 1, self._left - 1
        sums = ClippedSum({"statistic": total.clone()}, sensitivity)
        return self._noise.release(sums, multiplier=self._multiplier, step=step).values["statistic"]
