"""The commands, and the exit status of each outcome."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from privet._checks import check_at_least
from privet.accounting import (
    calibrate_noise_multiplier,
    calibrate_rate,
    calibrate_steps,
    get_accountant,
)
from privet.cli.answer import Down, Up, certified, show, show_curve
from privet.cli.audit import audit
from privet.cli.check import check
from privet.cli.completion import completion
from privet.cli.ledger import ledger
from privet.cli.options import (
    budget_options,
    noise_option,
    output_option,
    privacy_options,
    sampler_options,
    steps_option,
)
from privet.cli.plan import plan
from privet.cli.plot import check_plot, plot_curve
from privet.cli.report import report
from privet.cli.sampler import Sampler
from privet.cli.schedule import schedule
from privet.errors import PrivetError

__all__ = ["cli", "main"]

_DELTAS = tuple(float(f"1e-{exponent}") for exponent in range(3, 13))
_UNREACHABLE, _WRONG, _ABOVE, _INTERRUPTED = 1, 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="privet")
def cli() -> None:
    """Differentially private training: what a run costs before it runs, what it promised, and whether that holds.

    \b
    Exit status:
      0    an answer was printed
      1    there is no answer: the target is out of reach
      2    an option or a value is wrong
      3    ε is above --max-epsilon, or infinite where --max-epsilon is given
      4    a report is not of the ledger, or differs from it
      5    a model cannot be trained privately as it is
      130  interrupted
    """  # noqa: D301  the escape is click's mark for text that keeps its lines


@cli.command()
@sampler_options()
@noise_option
@steps_option
@click.option("--max-epsilon", type=float, help="Exit with status 3 if ε is above this, or infinite.")
@privacy_options
def epsilon(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    max_epsilon: float | None,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print ε of a run at δ, with a lower bound and what is to know about it."""
    if max_epsilon is not None:
        check_at_least("--max-epsilon", max_epsilon)
    bound = get_accountant(accountant).epsilon_bounds(
        sampler.event(noise_multiplier, steps), delta, relation=sampler.relation, group_size=group_size
    )
    values: dict[str, object] = {
        "epsilon": Up(bound.upper),
        "epsilon_lower_bound": Down(bound.lower),
        "delta": delta,
        **_asked(sampler, group_size, accountant),
        "method": bound.method,
        "notes": list(bound.notes),
    }
    if max_epsilon is not None:
        values["max_epsilon"] = max_epsilon
    show(values, as_json=as_json, title="Privacy of the run")
    if max_epsilon is not None and not bound.upper <= max_epsilon:
        print(f"privet: ε is above --max-epsilon {max_epsilon:g}.", file=sys.stderr)
        click.get_current_context().exit(_ABOVE)


@cli.command("delta")
@sampler_options()
@noise_option
@steps_option
@click.option("--epsilon", type=float, required=True, help="ε, at least 0.")
@click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered.")
@output_option
def delta_(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    epsilon: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print δ of a run at ε, with a lower bound and what is to know about it."""
    bound = get_accountant(accountant).delta_bounds(
        sampler.event(noise_multiplier, steps), epsilon, relation=sampler.relation, group_size=group_size
    )
    values: dict[str, object] = {
        "delta": Up(bound.upper),
        "delta_lower_bound": Down(bound.lower),
        "epsilon": epsilon,
        **_asked(sampler, group_size, accountant),
        "method": bound.method,
        "notes": list(bound.notes),
    }
    show(values, as_json=as_json, title="Privacy of the run")


@cli.command()
@sampler_options()
@steps_option
@budget_options
def noise(
    *, sampler: Sampler, steps: int, group_size: int, target: float, delta: float, accountant: str, as_json: bool
) -> None:
    """Print the least noise multiplier that keeps a run within (ε, δ)."""
    found = calibrate_noise_multiplier(
        target,
        delta,
        lambda sigma: sampler.event(sigma, steps),
        accountant=accountant,
        relation=sampler.relation,
        group_size=group_size,
    )
    every = "every noise multiplier fits, down to the least that was tried: the budget asks for no noise"
    show(certified("noise_multiplier", found, none_outside=every), as_json=as_json, title="Least noise")


@cli.command()
@sampler_options()
@noise_option
@click.option("--most", type=click.IntRange(1), default=10**9, show_default=True, help="How far to search.")
@budget_options
def steps(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    group_size: int,
    most: int,
    target: float,
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
        group_size=group_size,
        most=most,
    )
    every = f"{most} is the limit of the search (--most), not the end of the budget: more steps may fit"
    show(certified("steps", found, none_outside=every), as_json=as_json, title="Most steps")


@cli.command()
@sampler_options(seeks_rate=True)
@noise_option
@steps_option
@budget_options
def rate(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    target: float,
    delta: float,
    accountant: str,
    as_json: bool,
) -> None:
    """Print the greatest sampling rate that keeps a run within (ε, δ)."""
    found = calibrate_rate(
        target,
        delta,
        lambda each: sampler.at_rate(each).event(noise_multiplier, steps),
        accountant=accountant,
        relation=sampler.relation,
        group_size=group_size,
    )
    every = "every rate fits: the budget does not need sampling"
    show(certified("rate", found, none_outside=every), as_json=as_json, title="Greatest rate")


@cli.command()
@sampler_options()
@noise_option
@steps_option
@click.option(
    "--smallest-delta", type=float, default=1e-10, show_default=True, help="The least δ for which μ must hold."
)
@click.option(
    "--false-positive-rate", "rates", type=float, multiple=True, help="Also bound an attack; may be repeated."
)
@click.option("--accountant", default="pld", show_default=True, help="pld, rdp, gdp, or one registered.")
@output_option
def mu(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    smallest_delta: float,
    rates: tuple[float, ...],
    accountant: str,
    as_json: bool,
) -> None:
    """Print μ of the Gaussian that covers a run, and the true positive rates that no membership test exceeds."""
    event, chosen = sampler.event(noise_multiplier, steps), get_accountant(accountant)
    found = chosen.mu(event, smallest_delta=smallest_delta, relation=sampler.relation, group_size=group_size)
    powers = [
        chosen.true_positive_rate(event, each, relation=sampler.relation, group_size=group_size) for each in rates
    ]
    values: dict[str, object] = {
        "mu": Up(found),
        "smallest_delta": smallest_delta,
        "false_positive_rate": list(rates),
        "true_positive_rate": [Up(each) for each in powers],
        **_asked(sampler, group_size, accountant),
    }
    show(values, as_json=as_json, title="Gaussian privacy of the run")


@cli.command()
@sampler_options()
@noise_option
@steps_option
@click.option("--delta", "deltas", type=float, multiple=True, help="A δ to show; repeat for several.")
@click.option("--accountant", "accountants", multiple=True, default=("pld", "rdp"), show_default=True)
@output_option
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the curve into this file.")
def curve(
    *,
    sampler: Sampler,
    noise_multiplier: float,
    steps: int,
    group_size: int,
    deltas: tuple[float, ...],
    accountants: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Print the curve ε(δ), and draw it."""
    if plot is not None:
        check_plot(plot)
    event, wanted = sampler.event(noise_multiplier, steps), deltas or _DELTAS
    found = {
        name: get_accountant(name).curve(event, wanted, relation=sampler.relation, group_size=group_size)
        for name in dict.fromkeys(accountants)
    }
    show_curve(wanted, found, {"relation": sampler.relation.value, "group_size": group_size}, as_json=as_json)
    if plot is not None:
        plot_curve(plot, wanted, found)
        if not as_json:
            print(f"Drawn into {plot}")


for command in (audit, check, completion, ledger, plan, report, schedule):
    cli.add_command(command)


def _asked(sampler: Sampler, group_size: int, accountant: str) -> dict[str, object]:
    return {"relation": sampler.relation.value, "group_size": group_size, "accountant": accountant}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    try:
        status = cli.main(
            args=None if arguments is None else list(arguments), prog_name="privet", standalone_mode=False
        )
    except click.Abort:
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(_WRONG)
    except PrivetError as error:
        print(f"privet: {error}", file=sys.stderr)
        sys.exit(_WRONG if isinstance(error, ValueError) else _UNREACHABLE)
    sys.exit(status or 0)
