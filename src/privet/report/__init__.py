"""Reports that a reviewer can check: from a ledger to Markdown, HTML and JSON, and back to the ledger. Never torch."""

from __future__ import annotations

from privet.report.declared import TOPICS
from privet.report.digest import ledger_digest
from privet.report.report import Report
from privet.report.schema import schema
from privet.report.verify import Verification, verify_report

__all__ = ["TOPICS", "Report", "Verification", "ledger_digest", "schema", "verify_report"]
