"""The command line, `privet`: what a run costs, and reports of what one promised. Only this package prints."""

from __future__ import annotations

from privet.cli.main import main

__all__ = ["main"]
