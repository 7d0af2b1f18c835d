"""The facts of a report: all that is asked of the ledger and of its accountant, before anything is said."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from privet._checks import check_count, check_probability
from privet.accounting import Accountant, Bound, LedgerLike, Phase, get_accountant, known_accountants
from privet.accounting.role import check_ledger
from privet.errors import ConfigurationError, LedgerError
from privet.report.audits import Audit, audits_of
from privet.report.declared import check_declarations
from privet.report.described import known_size
from privet.report.digest import ledger_digest

__all__ = ["FALSE_POSITIVE_RATES", "Facts", "gathered"]

FALSE_POSITIVE_RATES = (1e-3, 1e-2, 1e-1)
_DECADES = range(3, 13)
_RATES = tuple(10.0 ** (-4.0 + index / 20.0) for index in range(81))  # of the picture
_PACKAGES = ("numpy", "scipy", "torch")


@dataclass(frozen=True)
class Facts:
    """What a report says, as numbers and texts.

    Attributes:
        digest: of the ledger, by `ledger_digest`.
        relation: the neighboring relation, by its name.
        unit: the unit of privacy, by its name.
        runs: how many runs the ledger holds, or None where it does not say.
        phases: what was begun, in order.
        marks: remarks of the ledger.
        delta: the δ that was asked for.
        epsilon: both bounds on ε at `delta`, the method and its notes.
        accountant: the name of the accountant.
        curve: (δ, ε) from the largest δ to the smallest.
        mu: the smallest μ whose Gaussian covers the curve.
        smallest_delta: down to which δ that holds.
        attacks: (false positive rate, most true positive rate of any test).
        receiver: the same at many false positive rates, for a picture.
        dataset_size: how many records there are, where it is public.
        declarations: what the user declared, by topic.
        audits: results of audits, and beside each the ε that the ledger promises at its δ.
        note: a remark of the author.
        created: when the report was made.
        versions: of the software that made the report.
    """

    digest: str
    relation: str
    unit: str
    runs: int | None
    phases: tuple[Phase, ...]
    marks: tuple[str, ...]
    delta: float
    epsilon: Bound
    accountant: str
    curve: tuple[tuple[float, float], ...]
    mu: float
    smallest_delta: float
    attacks: tuple[tuple[float, float], ...]
    receiver: tuple[tuple[float, float], ...]
    dataset_size: int | None
    declarations: Mapping[str, str]
    audits: tuple[tuple[Audit, float], ...]
    note: str | None
    created: str
    versions: Mapping[str, str]

    @property
    def promised(self) -> bool:
        """Whether there is any promise: ε is finite."""
        return math.isfinite(self.epsilon.upper)

    @property
    def steps(self) -> int:
        """How many steps or passes were begun."""
        return sum(phase.count for phase in self.phases)


def gathered(
    ledger: LedgerLike,
    *,
    delta: float,
    dataset_size: int | None,
    declarations: Mapping[str, str],
    audits: Iterable[Mapping[str, object]],
    note: str | None,
    created: str,
    accountant: Accountant | None = None,
) -> Facts:
    """Returns the facts of a ledger.

    Raises:
        LedgerError: if the ledger is empty.
        ConfigurationError: if δ is not in (0, 1) or not below 1/n, or a declaration or an audit is not of its form.
    """
    ledger = check_ledger(ledger)
    event, phases = ledger.event(), ledger.phases
    if not phases:
        raise LedgerError(
            "The ledger is empty: nothing was begun, so that there is nothing to claim. Give the ledger that the run "
            "wrote to."
        )
    size = known_size(phases) if dataset_size is None else check_count("dataset_size", dataset_size, 1)
    delta = _checked_delta(delta, size)
    accountant = _fresh(ledger.accountant) if accountant is None else accountant
    relation = ledger.relation
    deltas = sorted({delta, *(float(f"1e-{exponent}") for exponent in _DECADES)}, reverse=True)
    bound = accountant.epsilon_bounds(event, delta, relation=relation)
    epsilons = [bound.upper if each == delta else accountant.epsilon(event, each, relation=relation) for each in deltas]
    smallest = min(1e-10, delta)
    rates = (*FALSE_POSITIVE_RATES, *_RATES)
    powers = tuple(zip(rates, accountant.true_positive_rates(event, rates, relation=relation), strict=True))
    state = ledger.state_dict()
    runs = state.get("runs")
    return Facts(
        digest=ledger_digest(ledger),
        relation=relation.value,
        unit=ledger.unit.value,
        runs=len(runs) if isinstance(runs, Mapping) else None,
        phases=phases,
        marks=tuple(ledger.marks),
        delta=delta,
        epsilon=bound,
        accountant=accountant.name,
        curve=tuple(zip(deltas, epsilons, strict=True)),
        mu=accountant.mu(event, smallest_delta=smallest, relation=relation),
        smallest_delta=smallest,
        attacks=powers[: len(FALSE_POSITIVE_RATES)],
        receiver=powers[len(FALSE_POSITIVE_RATES) :],
        dataset_size=size,
        declarations=check_declarations(declarations),
        audits=tuple((each, accountant.epsilon(event, each.delta, relation=relation)) for each in audits_of(audits)),
        note=note,
        created=created,
        versions=_versions(),
    )


def _checked_delta(delta: object, size: int | None) -> float:
    found = check_probability("delta", delta)
    if not 0.0 < found < 1.0:
        raise ConfigurationError(f"delta must be above 0 and below 1, got {delta!r}.")
    if size is not None and found >= 1.0 / size:
        raise ConfigurationError(
            f"delta must be below 1/n = {1.0 / size:.3g} for n = {size} records, got {found:g}: a mechanism that "
            "publishes a random record whole would keep such a promise. Choose a smaller delta."
        )
    return found


def _fresh(accountant: Accountant) -> Accountant:
    """Returns a new accountant of the same name: one that was asked before may keep numbers that are a little rough."""
    if accountant.name in known_accountants():
        new = get_accountant(accountant.name)
        if type(new) is type(accountant):
            return new
    return accountant


def _versions() -> dict[str, str]:
    found = {"privet": "unknown", "python": platform.python_version()}
    for name in ("privet", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
