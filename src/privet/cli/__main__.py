"""`python -m privet.cli`."""

from __future__ import annotations

from privet.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
