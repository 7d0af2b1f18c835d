"""The report of a run, from its ledger: what was promised, how it was computed, and what it does not cover."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from privet.accounting import LedgerLike
from privet.report.contents import document_of
from privet.report.data import data_of
from privet.report.document import Document
from privet.report.facts import Facts, gathered
from privet.report.html import html_of
from privet.report.markdown import markdown_of

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """A report that a reviewer can check. Make it with `Report.of`.

    It follows the list of things to report of Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 5.3, and
    the hazards of NIST SP 800-226.

    Attributes:
        facts: everything that the report says, as numbers and texts.

    Example:
        >>> from privet.accounting import GaussianEvent, Ledger, PoissonEvent
        >>> from privet.report import Report
        >>> ledger = Ledger()
        >>> ledger.begin(PoissonEvent(0.01, GaussianEvent(1.0)), 1000)
        >>> report = Report.of(ledger, delta=1e-5, dataset_size=50_000, declarations={"tuning": "on public data"})
        >>> round(report.facts.epsilon.upper, 2)
        1.83
        >>> report.to_markdown().splitlines()[0]
        '# Privacy report'
    """

    facts: Facts

    @staticmethod
    def of(
        ledger: LedgerLike,
        *,
        delta: float,
        dataset_size: int | None = None,
        declarations: Mapping[str, str] | None = None,
        audits: Iterable[Mapping[str, object]] = (),
        note: str | None = None,
    ) -> Report:
        """Returns the report of everything that the ledger holds, under its relation, unit and accountant.

        Args:
            ledger: of the run, such as `engine.ledger`, `step.ledger` or `read_ledger(path)`.
            delta: δ in (0, 1), and below 1/n where the number of records is known.
            dataset_size: n, the number of records, where it is public.
            declarations: what the ledger cannot know, by topic (`privet.report.TOPICS`), in words of your own.
            audits: results of audits as mappings, such as `json.loads(audit.to_json())` of an audit of `privet.audit`.
            note: a remark of yours.

        Raises:
            LedgerError: if the ledger is empty, damaged or changed by hand.
            ConfigurationError: if δ is out of range, or a declaration or an audit is not of its form.
        """
        return Report(
            gathered(
                ledger,
                delta=delta,
                dataset_size=dataset_size,
                declarations=declarations or {},
                audits=audits,
                note=note,
                created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            )
        )

    @property
    def document(self) -> Document:
        """The report as sections of plain texts, tables and pictures, for a writer of your own."""
        return document_of(self.facts)

    def to_markdown(self) -> str:
        """Returns the report as Markdown, without pictures."""
        return markdown_of(self.document)

    def to_html(self) -> str:
        """Returns the report as one HTML file that loads nothing from elsewhere, with pictures."""
        return html_of(self.document)

    def to_json(self) -> str:
        """Returns the report as JSON in full precision, by the schema `privet.report.schema()`."""
        return json.dumps(data_of(self.facts), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
