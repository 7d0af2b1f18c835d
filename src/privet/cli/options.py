"""The options that several commands share, each defined once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

import click

from privet.accounting import Relation
from privet.cli.sampler import FORMS, sampler_of

__all__ = [
    "budget_options",
    "noise_option",
    "output_option",
    "privacy_options",
    "sampler_options",
    "steps_option",
    "warn_of_delta",
]

Command = Callable[..., None]

_DESCRIBING: list[Callable[[Command], Command]] = [
    click.option("--batch-size", type=click.IntRange(1), help="Expected (Poisson) or exact (fixed size) batch size."),
    click.option("--dataset-size", type=click.IntRange(1), help="Number of examples."),
    click.option("--cap", type=click.IntRange(1), help="Largest batch of truncated Poisson sampling."),
    click.option(
        "--relation",
        type=click.Choice([relation.value.replace("_", "-") for relation in Relation]),
        help="Neighbors  [default: add-or-remove-one; fixed-size: replace-one; partition: zero-out]",
    ),
    click.option(
        "--group-size", type=click.IntRange(1), default=1, show_default=True, help="Protect groups of so many records."
    ),
]
noise_option = click.option("--noise-multiplier", type=float, required=True, help="Noise std over the sensitivity.")
steps_option = click.option(
    "--steps",
    type=click.IntRange(0),
    required=True,
    help="Number of steps; of passes for a partition and for random allocation.",
)
output_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_accountant = click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered.")
_delta = click.option("--delta", type=float, required=True, help="δ, in [0, 1].")
_target = click.option("--epsilon", "target", type=float, required=True, help="The ε to stay within.")


def sampler_options(*, seeks_rate: bool = False) -> Callable[[Command], Command]:
    """Returns a decorator that adds the options of samplers, and hands the command the `Sampler` that they describe."""

    def add(command: Command) -> Command:
        @wraps(command)
        def with_sampler(
            *,
            sampler: str,
            batch_size: int | None,
            dataset_size: int | None,
            cap: int | None,
            relation: str | None,
            rate: float | None = None,
            **others: object,
        ) -> None:
            options = {"rate": rate, "batch_size": batch_size, "dataset_size": dataset_size, "cap": cap}
            described = sampler_of(sampler, relation, options, seeks_rate=seeks_rate)
            warn_of_delta(others.get("delta"), described.dataset_size)
            command(sampler=described, **others)

        kind = click.option(
            "--sampler",
            type=click.Choice(tuple(FORMS)),
            default="poisson",
            show_default=True,
            help="How batches are formed. Steps are passes with `partition` (any order) and `random-allocation`.",
        )
        rates = [] if seeks_rate else [click.option("--rate", type=float, help="Sampling rate, in [0, 1].")]
        return _with([kind, *rates, *_DESCRIBING], with_sampler)

    return add


def warn_of_delta(delta: object, records: int | None) -> None:
    """Says on the error stream if δ is 1/n or more."""
    if isinstance(delta, float) and records is not None and delta * records >= 1.0:
        print(
            f"privet: δ = {delta:g} is 1/n or more, with n = {records} records: to publish one record at random, in "
            f"clear, has that δ too. Give {0.1 / records:.1g} or less.",
            file=sys.stderr,
        )


def privacy_options(command: Command) -> Command:
    """Adds δ, the accountant and the form of the output."""
    return _with([_delta, _accountant, output_option], command)


def budget_options(command: Command) -> Command:
    """Adds ε and δ to stay within, the accountant and the form of the output."""
    return _with([_target, _delta, _accountant, output_option], command)


def _with(options: list[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
