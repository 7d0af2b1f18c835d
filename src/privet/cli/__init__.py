"""The command line: `privet epsilon`, `delta`, `noise`, `steps`, `rate`, `mu` and `curve`. Only this package prints."""

from __future__ import annotations

from privet.cli.main import main

__all__ = ["main"]
