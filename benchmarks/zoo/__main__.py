"""Does privet train the models that people train?

Without an argument, every case is examined that has no result yet, and the page is written. Otherwise an argument is a
part of a name of cases (llama, t5), or the name of a file of benchmarks/zoo/families (vision, by_hand).
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.zoo.case import Case
from benchmarks.zoo.examine import Finding
from benchmarks.zoo.families import FAMILIES, of_all
from benchmarks.zoo.page import page, verdict
from benchmarks.zoo.run import Results, run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "zoo.md"


def chosen(words: tuple[str, ...]) -> list[tuple[str, Case]]:
    """Returns the cases that have one of these words in their name or family, or all, each with its family's file."""
    found = [(family, case) for family in FAMILIES for case in of_all(family)]
    families = set(words) & set(FAMILIES)
    parts = [word.lower() for word in words if word not in FAMILIES]
    return [
        (family, case)
        for family, case in found
        if not words or family in families or any(part in case.name.lower() for part in parts)
    ]


@click.command(help=__doc__)
@click.argument("words", nargs=-1)
@click.option("--again", is_flag=True, help="Examine cases again that have a result.")
@click.option(
    "--short", is_flag=True, help="One clip norm, and dropout at the explicit door alone: a third of the time."
)
@click.option("--seconds", default=300.0, show_default=True, help="How long one case may take.")
@click.option("--jobs", default=1, show_default=True, help="How many processes examine cases.")
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), help="The file of results.")
@click.option("--out", default=PAGE, type=click.Path(path_type=Path), help="The page that is written.")
@click.option("--page", "only", is_flag=True, help="Examine nothing; write the page.")
def main(
    words: tuple[str, ...], *, again: bool, short: bool, seconds: float, jobs: int, results: Path, out: Path, only: bool
) -> None:
    """Examines what is asked for, and writes the page."""
    held, console = Results(results), Console()
    wanted = [(f, c) for f, c in chosen(words) if again or Results.key(c) not in held.found]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("models", total=len(wanted))

        def done(case: Case, finding: Finding) -> None:
            console.print(f"{case.name}: {verdict(finding)}", highlight=False, markup=False)
            progress.advance(task)

        if not only:
            run(wanted, held, seconds=seconds, short=short, jobs=jobs, done=done)
    out.write_text(page(held, [case for _, case in chosen(())]), encoding="utf-8")
    wrong = [key for key, finding in held.found.items() if verdict(finding) == "WRONG"]
    if wrong:
        raise SystemExit(f"wrong sums: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
