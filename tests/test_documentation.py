"""What the pages promise exists: the tests they name, the files they link to. And the runner of snippets works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import run_snippets as runner

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_that_a_page_names_exists(page):
    for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_tree_on_the_design_page_is_the_tree():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawn = re.search(r"^src/privet/\n(.*?)^tests/", page, re.DOTALL | re.MULTILINE)
    assert drawn
    listed = re.findall(r"\w+\.py\b", drawn[1])
    package = ROOT / "src" / "privet"
    files = [file.relative_to(package) for file in package.rglob("*.py")]
    assert set(listed) <= {file.name for file in files}, "the page names modules that do not exist"
    elsewhere = {file.name for file in files if file.parts[0] != "accounting"}  # of accounting/ the page names some
    unnamed = elsewhere - set(listed) - {"__init__.py", "__main__.py"}
    assert not unnamed, "modules are missing from the page"


def test_every_row_of_what_privet_stops_names_a_test():
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    stops = page.split("## What privet stops")[1].split("## What privet cannot see")[0]
    rows = [line for line in stops.splitlines() if line.startswith("|") and not line.startswith(("|---", "| pitfall"))]
    assert len(rows) > 10
    for row in rows:
        assert NAMED.search(row), row


def test_every_benchmark_and_script_has_a_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    runnable = [p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text(encoding="utf-8")]
    for path in (p for p in runnable if not p.stem.endswith("_cell")):  # a part of another, in a process of its own
        assert f"bench-{path.stem}:" in makefile, path.name
    assert "scripts/crosscheck-accounting" in makefile
    assert "scripts/check" in makefile


def test_the_runner_finds_setups_and_blocks_and_skips_with_a_reason():
    page = (
        "<!-- setup\nx = 1\n-->\n\n```python\ny = x\n```\n\n```\nnot python\n```\n\n"
        "<!-- not run: needs two machines -->\n\n```python\nboom()\n```\n"
    )
    found = runner.snippets(page)
    assert [(snippet.line, snippet.code) for snippet in found] == [(2, "x = 1"), (6, "y = x\n")]


def test_a_failing_block_is_reported_with_its_line_on_the_page(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nok = 1\nraise ValueError('rotten')\n```\n", encoding="utf-8")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (failure,) = runner.run_page(page)
    assert "line 4" in failure
    assert 'page.md", line 5' in failure
    assert "rotten" in failure
