"""`python -m privet`: the command line, where the `privet` program is not on the path."""

from __future__ import annotations

from privet.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
