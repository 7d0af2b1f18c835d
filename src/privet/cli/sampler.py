"""From options to an event: one place that knows which options a sampler needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import click

from privet.accounting import (
    Event,
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    TruncatedPoissonEvent,
    repeated,
)

__all__ = ["SAMPLERS", "Sampler", "privacy_options", "sampler_options"]

SAMPLERS = ("poisson", "truncated-poisson", "fixed-size", "partition", "none")
_DEFAULT_RELATION = {"fixed-size": Relation.REPLACE_ONE, "partition": Relation.ZERO_OUT}


@dataclass(frozen=True)
class Sampler:
    """A sampler as the options describe it."""

    name: str
    rate: float | None
    batch_size: int | None
    dataset_size: int | None
    cap: int | None
    relation_name: str | None

    def __post_init__(self) -> None:
        needs = {
            "poisson": (),
            "truncated-poisson": ("cap", "dataset_size"),
            "fixed-size": ("batch_size", "dataset_size"),
            "partition": (),
            "none": (),
        }[self.name]
        missing = [f"--{need.replace('_', '-')}" for need in needs if getattr(self, need) is None]
        if self.name in {"poisson", "truncated-poisson"} and self.rate is None:
            both = self.batch_size is not None and self.dataset_size is not None
            if not both:
                missing.append("--rate (or --batch-size with --dataset-size)")
        if missing:
            raise click.UsageError(f"The sampler {self.name!r} needs {' and '.join(missing)}.")

    @property
    def relation(self) -> Relation:
        """The relation asked for, or the one that the sampler is usually accounted under."""
        if self.relation_name is not None:
            return Relation(self.relation_name.replace("-", "_"))
        return _DEFAULT_RELATION.get(self.name, Relation.ADD_OR_REMOVE_ONE)

    def event(self, noise_multiplier: float, steps: int) -> Event:
        """Returns the event of so many steps; of a partition, of so many passes."""
        gaussian = GaussianEvent(noise_multiplier)
        step: Event = gaussian
        if self.name == "poisson":
            step = PoissonEvent(self._rate(), gaussian)
        elif self.name == "truncated-poisson":
            assert self.cap is not None
            assert self.dataset_size is not None
            step = TruncatedPoissonEvent(self._rate(), self.cap, self.dataset_size, gaussian)
        elif self.name == "fixed-size":
            assert self.batch_size is not None
            assert self.dataset_size is not None
            step = FixedSizeEvent(self.batch_size, self.dataset_size, gaussian)
        elif self.name == "partition":
            step = PartitionEvent(1, gaussian)
        return repeated(step, steps)

    def _rate(self) -> float:
        if self.rate is not None:
            return self.rate
        assert self.batch_size is not None
        assert self.dataset_size is not None
        return self.batch_size / self.dataset_size if self.dataset_size else 0.0


def sampler_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that describe a sampler, and hands the command the `Sampler` that they describe."""

    @wraps(command)
    def with_sampler(
        *,
        sampler: str,
        rate: float | None,
        batch_size: int | None,
        dataset_size: int | None,
        cap: int | None,
        relation: str | None,
        **others: object,
    ) -> None:
        command(sampler=Sampler(sampler, rate, batch_size, dataset_size, cap, relation), **others)

    return _with(
        [
            click.option(
                "--sampler",
                type=click.Choice(SAMPLERS),
                default="poisson",
                show_default=True,
                help="How batches are formed. With `partition` (shuffled or in order) --steps counts passes.",
            ),
            click.option("--rate", type=float, help="Sampling rate, in [0, 1]."),
            click.option("--batch-size", type=int, help="Expected (Poisson) or exact (fixed size) batch size."),
            click.option("--dataset-size", type=int, help="Number of examples."),
            click.option("--cap", type=int, help="Largest batch of truncated Poisson sampling."),
            click.option(
                "--relation",
                type=click.Choice([relation.value.replace("_", "-") for relation in Relation]),
                help="Neighbours  [default: add-or-remove-one; fixed-size: replace-one; partition: zero-out]",
            ),
        ],
        with_sampler,
    )


def privacy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds δ, the accountant and the form of the output."""
    return _with(
        [
            click.option("--delta", type=float, required=True, help="δ, in [0, 1]."),
            click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
        ],
        command,
    )


def _with(
    options: list[Callable[[Callable[..., None]], Callable[..., None]]], command: Callable[..., None]
) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command
