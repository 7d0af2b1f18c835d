"""The command line: `privet epsilon`, `noise`, `steps` and `curve`. The one place of the library that prints."""

from __future__ import annotations

from privet.cli.main import main

__all__ = ["main"]
