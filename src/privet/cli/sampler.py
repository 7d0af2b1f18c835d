"""From options to an event: one table of the options that each sampler takes. Any others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import click

from privet.accounting import (
    Event,
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    TruncatedPoissonEvent,
    repeated,
)

__all__ = ["FORMS", "Sampler", "sampler_of"]

# Each sampler, and the sets of options that describe it: exactly one of the sets must be given.
FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "poisson": (("rate",), ("batch_size", "dataset_size")),
    "truncated-poisson": (("rate", "cap", "dataset_size"), ("batch_size", "cap", "dataset_size")),
    "fixed-size": (("batch_size", "dataset_size"),),
    "random-allocation": (("batch_size", "dataset_size"),),
    "partition": ((),),
    "none": ((),),
}
_DEFAULT_RELATION = {"fixed-size": Relation.REPLACE_ONE, "partition": Relation.ZERO_OUT}


@dataclass(frozen=True)
class Sampler:
    """A sampler, as one of its sets of options describes it."""

    name: str
    relation: Relation
    rate: float | None = None
    batch_size: int | None = None
    dataset_size: int | None = None
    cap: int | None = None

    def at_rate(self, rate: float) -> Sampler:
        """Returns the same sampler with this sampling rate."""
        return replace(self, rate=rate)

    def event(self, noise_multiplier: float, steps: int) -> Event:
        """Returns the event of so many steps; of a partition and of random allocation, of so many passes."""
        gaussian = GaussianEvent(noise_multiplier)
        step: Event = gaussian
        if self.name == "poisson":
            step = PoissonEvent(self._rate(), gaussian)
        elif self.name == "truncated-poisson":
            assert self.cap is not None
            assert self.dataset_size is not None
            step = TruncatedPoissonEvent(self._rate(), self.cap, self.dataset_size, gaussian)
        elif self.name == "fixed-size":
            assert self.batch_size is not None
            assert self.dataset_size is not None
            step = FixedSizeEvent(self.batch_size, self.dataset_size, gaussian)
        elif self.name == "random-allocation":
            # A pass has as many batches as `RandomAllocation.of` gives it.
            step = RandomAllocationEvent(max(1, round(1.0 / self._rate())), gaussian)
        elif self.name == "partition":
            step = PartitionEvent(1, gaussian)
        return repeated(step, steps)

    def _rate(self) -> float:
        if self.rate is not None:
            return self.rate
        assert self.batch_size is not None
        assert self.dataset_size is not None
        return self.batch_size / self.dataset_size


def sampler_of(
    name: str, relation: str | None, options: Mapping[str, float | int | None], *, seeks_rate: bool
) -> Sampler:
    """Returns the sampler that the options describe; a command that `seeks_rate` takes none.

    Raises:
        click.UsageError: if the options given are not one of the sampler's sets. The message names what is missing and
            what to leave out.
    """
    forms = FORMS[name]
    if seeks_rate:
        forms = tuple(tuple(each for each in form if each != "rate") for form in forms if "rate" in form)
        if not forms:
            able = " and ".join(each for each, sets in FORMS.items() if any("rate" in form for form in sets))
            raise click.UsageError(f"The sampler '{name}' has no rate to find. Expected one that has: {able}.")
    given = {key: value for key, value in options.items() if value is not None}
    if not any(set(form) == set(given) for form in forms):
        raise click.UsageError(_mismatch(name, forms, given))
    if name != "fixed-size" and "batch_size" in given and given["batch_size"] > given["dataset_size"]:
        raise click.UsageError(
            f"--batch-size must be at most --dataset-size, got {given['batch_size']} of {given['dataset_size']}."
        )
    known = _DEFAULT_RELATION.get(name, Relation.ADD_OR_REMOVE_ONE)
    return Sampler(name, known if relation is None else Relation(relation.replace("-", "_")), **given)  # type: ignore[arg-type]


def _mismatch(name: str, forms: tuple[tuple[str, ...], ...], given: Mapping[str, object]) -> str:
    """Returns what is wrong with a set of options, and how to come to the set that needs the fewest additions."""
    form = min(forms, key=lambda each: (len(set(each) - set(given)), len(set(given) - set(each))))
    missing = [each for each in form if each not in given]
    # Where two sets are there in full, the choice between them is not ours.
    kept = [form] if missing else [each for each in forms if set(each) <= set(given)]
    surplus = ", or ".join(filter(None, (_options([each for each in given if each not in one]) for one in kept)))
    expected = ", or ".join(_options(each) or "none of the options of a sampler" for each in forms)
    advice = [f"Add {_options(missing)}."] * bool(missing) + [f"Leave out {surplus}."] * bool(surplus)
    return f"The sampler '{name}' takes {expected}, got {_options(given) or 'none'}. {' '.join(advice)}"


def _options(names: Iterable[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)
