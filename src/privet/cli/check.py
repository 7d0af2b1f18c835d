"""`privet check`: whether a model can be trained privately as it is, and what one step costs."""

from __future__ import annotations

import click

from privet.cli.answer import show
from privet.cli.factory import made_by
from privet.cli.options import output_option

__all__ = ["check"]

_REFUSED = 5


@click.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@output_option
def check(*, factory: str, as_json: bool) -> None:
    """Say whether a model can be trained privately as it is.

    \b
    MODULE:FACTORY names a function without arguments that returns one of
      model
      model, inputs          inputs: of its forward; a tensor, a tuple or a dict
      model, batch, loss     loss(model, batch): one loss for each example

    With a loss, one private step of a copy runs with every check of a training, and its time is compared with that of
    a plain step. Exit status 5 says that the model is refused.
    """  # noqa: D301  the escape is click's mark for text that keeps its lines
    from privet.cli.trial import trial_of  # torch takes its time

    trial = trial_of(factory, made_by(factory))
    issues = trial.issues()
    values: dict[str, object] = {
        "trainable": not issues,
        "parameters": sum(p.numel() for p in trial.model.parameters() if p.requires_grad),
        "looked_at": trial.looked_at,
        "issues": issues,
    }
    if trial.loss is not None and not issues:
        cost = trial.cost()
        values |= {
            "examples": cost.examples,
            "private_step_ms": round(1e3 * cost.private, 3),
            "plain_step_ms": round(1e3 * cost.plain, 3),
            "private_over_plain": round(cost.private / cost.plain, 2),
            "memory_mib": None if cost.mebibytes is None else round(cost.mebibytes, 1),
        }
    show(values, as_json=as_json, title="Private training of the model")
    if issues:
        click.get_current_context().exit(_REFUSED)
