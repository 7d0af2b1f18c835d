"""`privet audit`: attempts to refute a claim, on a training that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from privet.cli.factory import made_by
from privet.cli.options import output_option
from privet.errors import ConfigurationError

__all__ = ["audit"]

_REFUTED = 3


@click.group()
def audit() -> None:
    """Try to refute a privacy claim by experiment."""


@audit.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--delta", type=float, default=1e-5, show_default=True, help="δ of the ε that are compared.")
@click.option("--canaries", type=click.IntRange(8), default=1000, show_default=True, help="How many are tossed for.")
@click.option("--confidence", type=float, default=0.999, show_default=True, help="That a bound is not above the truth.")
@click.option("--rows/--no-rows", default=True, show_default=True, help="Also train with one row in the spotlight.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON to this file.")
@output_option
def mechanism(
    *, factory: str, delta: float, canaries: int, confidence: float, rows: bool, out: Path | None, as_json: bool
) -> int:
    """Measure the noise and the batches of a training, and compare them with what it bills.

    \b
    MODULE:FACTORY names a function without arguments that returns three things:
      train     train(model, dataset) trains privately, and returns the engine (or step, ledger, event)
      model     the network
      dataset   the records

    Exit status 3 says that the claim was refuted.
    """  # noqa: D301  the escape is click's mark for text that keeps its lines
    from privet.audit import audit_mechanism  # torch takes its time; no other command needs it

    train, model, dataset = _made(factory)
    with Console(stderr=True).status("training with canaries"):
        found = audit_mechanism(
            train, model=model, dataset=dataset, delta=delta, canaries=canaries, confidence=confidence, rows=rows
        )
    if out is not None:
        partial = out.with_name(out.name + ".part")
        partial.write_text(found.to_json() + "\n", encoding="utf-8")
        partial.replace(out)
    print(found.to_json() if as_json else found)
    return 0 if found.passed else _REFUTED


def _made(name: str) -> tuple[Any, Any, Any]:
    made = made_by(name)
    if not isinstance(made, tuple) or len(made) != 3:
        raise ConfigurationError(
            f"{name} returned {type(made).__name__}. Expected a tuple of three: train, model and data set."
        )
    return made
