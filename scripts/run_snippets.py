"""Runs the Python examples of the README, of `docs/` and of every docstring, so that none of them can rot.

In a page, the fenced `python` blocks run one after another in one namespace. A block that needs something the reader
can imagine (a model, a loader) gets it from a comment that readers do not see:

    <!-- setup
    model = torch.nn.Linear(4, 2)
    -->

and a block that is not to be run says why in a comment right above it: `<!-- not run: needs two machines -->`.
"""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)\n-->"
    r"|(?P<skip><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """A piece of Python in a page, and the line that it starts on."""

    line: int
    code: str


def snippets(text: str) -> list[Snippet]:
    """Returns what is to be run of a page, in its order: set-up comments and fenced blocks."""
    found = []
    for match in BLOCK.finditer(text):
        if match["skip"]:
            continue
        group = "setup" if match["setup"] is not None else "code"
        found.append(Snippet(line=text.count("\n", 0, match.start(group)) + 1, code=match[group]))
    return found


def run_page(path: Path) -> list[str]:
    """Returns the failures of one page, at most one: what follows a failed block would fail for want of its names."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(path.read_text(encoding="utf-8")):
        # Leading newlines make a traceback's line numbers those of the page.
        source = "\n" * (snippet.line - 1) + snippet.code
        try:
            exec(compile(source, str(path), "exec"), namespace)  # noqa: S102  running the page is the purpose
        except Exception:  # noqa: BLE001  whatever a page raises is reported, and the other pages still run
            return [f"{path.relative_to(ROOT)}, the block at line {snippet.line}\n{traceback.format_exc(limit=-3)}"]
    return []


def run_docstrings() -> tuple[list[str], int]:
    """Returns the modules with failed docstring examples, and how many examples there were in all."""
    failures, attempted = [], 0
    import privet  # late: the pages come first, and must not find anything loaded already

    for module in pkgutil.walk_packages(privet.__path__, "privet."):
        try:
            loaded = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":  # which tests and documentation do without
                raise
            continue
        result = doctest.testmod(loaded)
        attempted += result.attempted
        if result.failed:
            failures.append(f"{module.name}: {result.failed} docstring examples failed")
    return failures, attempted


def main() -> int:
    """Returns 0 if every example ran, 1 otherwise."""
    warnings.simplefilter("error")
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    count = sum(len(snippets(page.read_text(encoding="utf-8"))) for page in pages)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        failures = [failure for page in pages for failure in run_page(page)]
        docstring_failures, docstring_count = run_docstrings()
    failures += docstring_failures
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{count} snippets of {len(pages)} pages, {docstring_count} docstring examples: {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
