"""`privet report`: the report of a ledger's file, and the check of a report against it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from privet.accounting import read_ledger
from privet.errors import ConfigurationError
from privet.report import TOPICS, Report, verify_report

__all__ = ["report"]

_DIFFERS = 4
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("ledger", type=_FILE)
@click.option("--delta", type=float, help="δ, in (0, 1) and below 1/n. Needed but for --verify.")
@click.option("--dataset-size", type=click.IntRange(1), help="Number of records n, where it is public.")
@click.option(
    "--format", "form", type=click.Choice(["markdown", "html", "json"]), default="markdown", show_default=True
)
@click.option("--out", type=_FILE, help="Write into this file, and print nothing.")
@click.option(
    "--audit", "audits", type=_FILE, multiple=True, help="JSON of an audit, or a list of them; may be repeated."
)
@click.option("--note", help="A remark to stand in the report.")
@click.option(
    "--declare",
    "declared",
    multiple=True,
    metavar="TOPIC=TEXT",
    help=f"Say what was done; may be repeated. {', '.join(TOPICS)}.",
)
@click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered.")
@click.option("--verify", type=_FILE, help="Check this report, in its JSON form, against the ledger, and make none.")
def report(
    *,
    ledger: Path,
    delta: float | None,
    dataset_size: int | None,
    form: str,
    out: Path | None,
    audits: tuple[Path, ...],
    note: str | None,
    declared: tuple[str, ...],
    accountant: str,
    verify: Path | None,
) -> None:
    """Report what the file of a FileLedger promises, or check such a report.

    LEDGER is read, and neither made nor changed.
    """
    if verify is not None:
        _verify(ledger, verify)
        return
    if delta is None:
        raise click.UsageError("--delta is needed: ε is said for one δ. Choose it below 1/n for n records.")
    found = Report.of(
        read_ledger(ledger, accountant=accountant),
        delta=delta,
        dataset_size=dataset_size,
        declarations=_declarations(declared),
        audits=[each for path in audits for each in _audits(path)],
        note=note,
    )
    text = {"markdown": found.to_markdown, "html": found.to_html, "json": found.to_json}[form]()
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"The report cannot be written to {out}: {error.strerror}.") from None


def _verify(ledger: Path, path: Path) -> None:
    """Prints what came of the check; the exit status is 0 only where everything holds."""
    found = verify_report(_json(path), read_ledger(ledger))
    if found.holds:
        print(f"{path} is a report of {ledger}, and says what the accountant says.")
        return
    what = "of this ledger, and differs from it" if found.same_ledger else "not of this ledger"
    print("\n".join([f"{path} is {what}:", *(f"  {each}" for each in found.differences)]))
    click.get_current_context().exit(_DIFFERS)


def _declarations(declared: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in declared:
        topic, equals, text = each.partition("=")
        if not equals or topic in found:
            raise click.UsageError(f"--declare takes TOPIC=TEXT, each topic once, got {each!r}.")
        found[topic] = text
    return found


def _audits(path: Path) -> list[dict[str, object]]:
    found = _json(path)
    return found if isinstance(found, list) else [found]


def _json(path: Path) -> Any:
    """Returns what a file of JSON holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}.") from None
