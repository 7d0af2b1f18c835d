"""`privet plan`: from the data, the budget and the epochs to rate, steps and noise, for several batch sizes."""

from __future__ import annotations

import math

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from privet.accounting import GaussianEvent, PoissonEvent, calibrate_noise_multiplier, repeated
from privet.accounting.decimals import rounded_text
from privet.cli.answer import print_json
from privet.cli.factory import made_by
from privet.cli.options import budget_options, warn_of_delta
from privet.errors import ConfigurationError

__all__ = ["plan"]


@click.command()
@click.option("--dataset-size", type=click.IntRange(1), required=True, help="Number of examples n.")
@click.option("--epochs", type=click.IntRange(1), required=True, help="Passes over the data, on average.")
@click.option(
    "--batch-size", "sizes", type=click.IntRange(1), multiple=True, help="Expected batch size; repeat to compare."
)
@click.option(
    "--model",
    "factory",
    metavar="MODULE:FACTORY",
    help="Also measure steps of this model. The function returns a model, a batch and a loss per example.",
)
@budget_options
def plan(
    *,
    dataset_size: int,
    epochs: int,
    sizes: tuple[int, ...],
    factory: str | None,
    target: float,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Plan a run: sampling rate, steps and least noise for (ε, δ), n and epochs.

    The noise of a step's mean gradient is the noise multiplier times the clip norm, over the batch size: the smaller,
    the better. Larger batches have less of it, and fewer steps.
    """
    warn_of_delta(delta, dataset_size)
    chosen = _checked(sizes, dataset_size)
    plans = [
        _planned(size, dataset_size, epochs, target=target, delta=delta, accountant=accountant)
        for size in track(chosen, "calibrating", console=Console(stderr=True), transient=True)
    ]
    if factory is not None:
        seconds, mebibytes = _measured(factory)
        for each in plans:
            each["hours"] = seconds * float(str(each["batch_size"])) * int(str(each["steps"])) / 3600
            each["physical_memory_mib"] = mebibytes
    _show(plans, epsilon=target, delta=delta, as_json=as_json)


def _checked(sizes: tuple[int, ...], dataset_size: int) -> list[int]:
    """Returns the batch sizes to plan for: those given, or powers of four that fit the data."""
    if too_large := [size for size in sizes if size > dataset_size]:
        raise click.UsageError(f"--batch-size must be at most --dataset-size {dataset_size}, got {too_large[0]}.")
    usual = [4**power for power in range(2, 9) if 4**power <= dataset_size // 4]
    return sorted(set(sizes)) or usual or [max(dataset_size // 4, 1)]


def _planned(
    size: int, dataset_size: int, epochs: int, *, target: float, delta: float, accountant: str
) -> dict[str, object]:
    """Returns one row of the plan; as many steps as `make_private_with_epsilon` plans for."""
    steps, rate = epochs * math.ceil(dataset_size / size), size / dataset_size
    found = calibrate_noise_multiplier(
        target, delta, lambda sigma: repeated(PoissonEvent(rate, GaussianEvent(sigma)), steps), accountant=accountant
    )
    return {
        "batch_size": size,
        "rate": rate,
        "steps": steps,
        "noise_multiplier": found.value,
        "epsilon": found.epsilon,
        "noise_of_the_mean": found.value / size,
    }


def _measured(factory: str) -> tuple[float, float | None]:
    """Returns the seconds that one example takes in a private step of the model, and the MiB of one step."""
    from privet.cli.trial import trial_of  # torch takes its time

    trial = trial_of(factory, made_by(factory))
    if trial.loss is None:
        raise ConfigurationError(f"{factory} must return three things to be measured: a model, a batch and a loss.")
    if issues := trial.issues():
        raise ConfigurationError(f"the model of {factory} cannot be trained privately as it is: {'; '.join(issues)}")
    cost = trial.cost()
    return cost.private / cost.examples, cost.mebibytes


def _show(plans: list[dict[str, object]], *, epsilon: float, delta: float, as_json: bool) -> None:
    if as_json:
        print_json({"target_epsilon": epsilon, "delta": delta, "plans": plans})
        return
    heads = {
        "batch_size": "batch size",
        "rate": "rate",
        "steps": "steps",
        "noise_multiplier": "noise multiplier",
        "epsilon": "ε",
        "noise_of_the_mean": "noise of the mean / C",
        "hours": "hours",
        "physical_memory_mib": "MiB of one batch",
    }
    table = Table(*(heads[name] for name in plans[0]), title=f"Plans for ε = {epsilon:g} at δ = {delta:g}")
    for each in plans:
        table.add_row(*(_text(name, value) for name, value in each.items()))
    Console().print(table)


def _text(name: str, value: object) -> str:
    if isinstance(value, float):
        return rounded_text(value, up=True) if name in {"noise_multiplier", "epsilon"} else f"{value:.3g}"
    return "not known" if value is None else str(value)
