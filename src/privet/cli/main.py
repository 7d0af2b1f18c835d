"""The commands. Exit codes: 0 done, 1 no answer (a target out of reach), 2 a wrong option or value."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from privet.accounting import (
    Accountant,
    Certificate,
    calibrate_noise_multiplier,
    calibrate_steps,
    get_accountant,
)
from privet.cli.plot import plot_curve
from privet.cli.sampler import Sampler, privacy_options, sampler_options
from privet.errors import PrivetError

__all__ = ["cli", "main"]

_DELTAS = tuple(10.0**-exponent for exponent in range(3, 13))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="privet")
def cli() -> None:
    """Differential privacy accounting: what a training run costs, before it runs."""


@cli.command()
@sampler_options
@click.option("--noise-multiplier", type=float, required=True, help="Noise std over the sensitivity.")
@click.option("--steps", type=int, required=True, help="Number of steps; of passes for a partition.")
@click.option("--group-size", type=int, default=1, show_default=True, help="Protect groups of this many records.")
@privacy_options
def epsilon(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print ε of a run, with a lower bound and what is to know about it."""
    bound = get_accountant(accountant).epsilon_bounds(
        sampler.event(noise_multiplier, steps), delta, relation=sampler.relation, group_size=group_size
    )
    values: dict[str, object] = {
        "epsilon": bound.upper,
        "epsilon_lower_bound": bound.lower,
        "delta": delta,
        "relation": sampler.relation.value,
        "accountant": accountant,
        "method": bound.method,
        "notes": list(bound.notes),
    }
    _show(values, as_json=as_json, title="Privacy of the run")


@cli.command()
@sampler_options
@click.option("--epsilon", "target", type=float, required=True, help="The ε to reach.")
@click.option("--steps", type=int, required=True, help="Number of steps; of passes for a partition.")
@privacy_options
def noise(
    *,
    sampler: Sampler,
    target: float,
    steps: int,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print the least noise multiplier that keeps a run within (ε, δ)."""
    found = calibrate_noise_multiplier(
        target,
        delta,
        lambda sigma: sampler.event(sigma, steps),
        accountant=accountant,
        relation=sampler.relation,
    )
    _show(_certified("noise_multiplier", found.value, found), as_json=as_json, title="Least noise")


@cli.command()
@sampler_options
@click.option("--epsilon", "target", type=float, required=True, help="The ε to stay within.")
@click.option("--noise-multiplier", type=float, required=True, help="Noise std over the sensitivity.")
@privacy_options
def steps(
    *,
    sampler: Sampler,
    target: float,
    noise_multiplier: float,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print the most steps (passes, for a partition) that stay within (ε, δ)."""
    found = calibrate_steps(
        target,
        delta,
        lambda count: sampler.event(noise_multiplier, count),
        accountant=accountant,
        relation=sampler.relation,
    )
    _show(_certified("steps", int(found.value), found), as_json=as_json, title="Most steps")


@cli.command()
@sampler_options
@click.option("--noise-multiplier", type=float, required=True, help="Noise std over the sensitivity.")
@click.option("--steps", type=int, required=True, help="Number of steps; of passes for a partition.")
@click.option("--delta", "deltas", type=float, multiple=True, help="A δ to show; repeat for several.")
@click.option("--accountant", "accountants", multiple=True, default=("pld", "rdp"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the curve into this file.")
def curve(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    deltas: tuple[float, ...],
    accountants: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Print the curve ε(δ), and draw it."""
    event = sampler.event(noise_multiplier, steps)
    wanted = tuple(deltas) or _DELTAS
    found: dict[str, tuple[float, ...]] = {}
    for name in dict.fromkeys(accountants):
        accountant: Accountant = get_accountant(name)
        found[name] = accountant.curve(event, wanted, relation=sampler.relation)
    if as_json:
        _print_json({"relation": sampler.relation.value, "delta": list(wanted), "epsilon": found})
    else:
        table = Table("δ", *(f"ε ({name})" for name in found), title=f"ε(δ), {sampler.relation.value}")
        for place, delta in enumerate(wanted):
            table.add_row(f"{delta:g}", *(f"{values[place]:.4f}" for values in found.values()))
        Console().print(table)
    if plot is not None:
        plot_curve(plot, wanted, found)
        if not as_json:
            Console().print(f"Drawn into {plot}")


def _certified(name: str, value: float, found: Certificate) -> dict[str, object]:
    return {
        name: value,
        "epsilon": found.epsilon,
        "just_inside": found.inside,
        "epsilon_just_inside": found.epsilon_inside,
        "target_epsilon": found.target_epsilon,
        "delta": found.delta,
        "relation": found.relation.value,
        "accountant": found.accountant,
    }


def _show(values: dict[str, object], *, as_json: bool, title: str) -> None:
    if as_json:
        _print_json(values)
        return
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        if isinstance(shown, list):
            shown = "; ".join(shown)
        if shown not in {"", None}:
            table.add_row(name.replace("_", " "), str(shown))
    Console().print(table)


def _print_json(values: dict[str, object]) -> None:
    """JSON has no infinity; it is printed as the text "inf", which every reader notices."""

    def plain(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return value

    print(json.dumps(plain(values), ensure_ascii=False, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="privet", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ValueError as error:
        if not isinstance(error, PrivetError):
            raise
        print(f"privet: {error}", file=sys.stderr)
        sys.exit(2)
    except PrivetError as error:
        print(f"privet: {error}", file=sys.stderr)
        sys.exit(1)
