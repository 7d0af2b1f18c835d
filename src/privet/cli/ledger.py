"""`privet ledger`: what ran, by the file of a ledger, and what it cost."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from privet.accounting import read_ledger
from privet.cli.answer import Down, Up, print_json, show
from privet.cli.options import output_option
from privet.report.described import described

__all__ = ["ledger"]


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--delta", type=float, help="Also print ε at this δ, in (0, 1) and below 1/n.")
@click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered.")
@output_option
def ledger(*, file: Path, delta: float | None, accountant: str, as_json: bool) -> None:
    """Print what ran, by the file of a FileLedger: phases, marks, and ε.

    FILE is read, and neither made nor changed. `privet report` writes the same in full, for people who were not there.
    """
    found = read_ledger(file, accountant=accountant)
    phases = [
        {"count": phase.count, "sampling": words.sampler, "mechanism": words.mechanism}
        for phase in found.phases
        for words in [described(phase.event)]
    ]
    values: dict[str, object] = {
        "steps": found.steps,
        "relation": found.relation.value,
        "unit": found.unit.value,
        "marks": list(found.marks),
    }
    if delta is not None:
        bound = found.epsilon_bounds(delta)
        values |= {
            "epsilon": Up(bound.upper),
            "epsilon_lower_bound": Down(bound.lower),
            "delta": delta,
            "accountant": accountant,
            "notes": list(bound.notes),
        }
    if as_json:
        print_json({**values, "phases": phases})
        return
    table = Table("count", "sampling", "mechanism", title="What ran")
    for each in phases:
        table.add_row(*map(str, each.values()))
    Console().print(table)
    show(values, as_json=False, title="Ledger")
