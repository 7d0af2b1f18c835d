"""Every model of transformers that can recompute its activations, with both kinds of torch's checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.zoo.case import Case
from benchmarks.zoo.families import causal, encoders, experts, seq2seq, series, sound, vision


def _with(case: Case, *, reentrant: bool) -> Case:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    kind = "reentrant" if reentrant else "not reentrant"
    return replace(case, name=f"{case.name}, {kind}", prepare=prepare, short=True)


def cases() -> list[Case]:
    """Returns the cases of this family."""
    homes = (causal, experts, encoders, seq2seq, sound, series, vision)
    models = [case for home in homes for case in home.cases() if not case.refused]
    return [_with(case, reentrant=reentrant) for case in models for reentrant in (True, False)]
