"""`privet schedule`: who is in which batch, drawn before the run into files that a loader follows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from privet.cli.answer import show
from privet.cli.options import output_option

if TYPE_CHECKING:
    from privet.sampling.offline import Laws

__all__ = ["schedule"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sampler",
    type=click.Choice(("poisson", "truncated-poisson", "random-allocation")),
    default="poisson",
    show_default=True,
    help="How batches are formed.",
)
@click.option("--dataset-size", type=click.IntRange(1), required=True, help="Number of records.")
@click.option("--batch-size", type=click.IntRange(1), required=True, help="Expected batch size.")
@click.option("--cap", type=click.IntRange(1), help="Largest batch of truncated Poisson sampling.")
@click.option(
    "--passes", type=click.IntRange(1), default=1, show_default=True, help="Passes over the data, on average."
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="Also keep the key in this new file: other machines find the steps of their records with it. SECRET.",
)
@output_option
def schedule(
    *,
    folder: Path,
    sampler: str,
    dataset_size: int,
    batch_size: int,
    cap: int | None,
    passes: int,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Draw a schedule into a new FOLDER. Its files are SECRET: they say who is in which batch.

    The folder can be read by its owner alone. Train on it with sampling=DrawnSchedule.open(FOLDER). Each batch can be
    used once; draw a new schedule for another run.
    """
    if sampler != "truncated-poisson" and cap is not None:
        raise click.UsageError(f"--cap is of truncated-poisson, and the sampler is {sampler}. Leave it out.")
    if batch_size > dataset_size:
        raise click.UsageError(f"--batch-size must be at most --dataset-size {dataset_size}, got {batch_size}.")
    from privet.sampling import DrawnSchedule, draw_schedule  # torch takes its time

    law = _law(sampler, batch_size, dataset_size, cap)
    key = None if key_file is None else _kept_key(key_file)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("drawing", total=1.0)
        try:
            draw_schedule(
                folder,
                law,
                dataset_size=dataset_size,
                passes=passes,
                key=key,
                progress=lambda part: bar.update(task, completed=part),
            )
        except BaseException:
            if key_file is not None:
                key_file.unlink()
            raise
    drawn = DrawnSchedule.open(folder)
    values: dict[str, object] = {
        "folder": str(folder),
        "law": repr(law),
        "dataset_size": dataset_size,
        "passes": passes,
        "steps_per_pass": drawn.steps_of_a_pass,
        "steps": drawn.steps,
        "expected_batch_size": drawn.expected_batch_size(dataset_size),
        "digest": drawn.digest,
        "notes": ["the files are secret: they say who is in which batch. They are used once. Do not copy the folder."],
    }
    show(values, as_json=as_json, title="Schedule")


def _law(sampler: str, batch_size: int, dataset_size: int, cap: int | None) -> Laws:
    """Returns the law that the options describe."""
    from privet.sampling import Poisson, RandomAllocation, TruncatedPoisson

    if sampler == "random-allocation":
        return RandomAllocation.of(batch_size, dataset_size)
    if sampler == "poisson":
        return Poisson.of(batch_size, dataset_size)
    if cap is None:
        return TruncatedPoisson.of(batch_size, dataset_size)
    return TruncatedPoisson(batch_size / dataset_size, cap, dataset_size)


def _kept_key(path: Path) -> bytes:
    """Returns a fresh key that was written to a new file, which its owner alone can read."""
    from privet.sampling.offline import fresh_key

    key = fresh_key()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
    except FileExistsError:
        raise click.UsageError(
            f"--key-file {path} exists. Expected a new file: a key that serves two schedules draws the same twice."
        ) from None
    return key
