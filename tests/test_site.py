"""The site has every page, and leads links to where things lie in it. `make docs` builds it, and checks every link."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import griffe
import pytest
import yaml

from scripts import docs_examples, docs_hooks

ROOT = Path(__file__).resolve().parent.parent


def pages_in(item):
    if isinstance(item, dict):
        return [page for each in item.values() for page in pages_in(each)]
    if isinstance(item, list):
        return [page for each in item for page in pages_in(each)]
    return [item]


def navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return pages_in(docs_hooks.expanded(settings["nav"]))


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page():
    named = navigation()
    assert len(named) == len(set(named))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in named if not page.startswith("repository/")} == pages


def test_a_folder_in_the_navigation_stands_for_its_pages():
    found = docs_hooks.expanded([{"Decisions": "decisions/"}, {"Scripts": "repository/examples/"}])
    assert len(found[0]["Decisions"]) == len(list((ROOT / "docs" / "decisions").glob("*.md")))
    assert found[1]["Scripts"][0] == "repository/examples/index.md"
    assert "repository/examples/digits.py.md" in found[1]["Scripts"]


def test_an_address_in_the_site_leads_back_to_the_file():
    shown = [path.relative_to(ROOT).as_posix() for path in docs_hooks.shown_files()]
    assert {"CHANGELOG.md", "examples/digits.py", "benchmarks/results/spine.md"} <= set(shown)
    for path in [*shown, "docs/start.md", "docs/howto/gan.md"]:
        assert docs_hooks.origin(docs_hooks.address(path)) == path


@pytest.mark.parametrize(
    ("here", "written", "led"),
    [
        ("howto/gan.md", "[x](../../examples/gan.py)", "[x](../repository/examples/gan.py.md)"),
        ("modes.md", "[x](../benchmarks/results/modes.md#a)", "[x](repository/benchmarks/results/modes.md#a)"),
        ("repository/CONTRIBUTING.md", "[x](docs/design.md)", "[x](../design.md)"),
        ("start.md", "[x](audits.md) [y](https://example.org/a.md) [z](#here)", None),
        ("start.md", "[x](nowhere.md)", None),  # left as it is, for MkDocs to name
    ],
)
def test_links_between_files_are_led_to_their_places(here, written, led):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=here))
    found = docs_hooks.on_page_markdown(written, page=page, config=None, files=None)
    assert found == (written if led is None else led)


def test_the_example_of_a_docstring_is_shown_as_code():
    extensions = griffe.load_extensions(docs_examples.ExampleSections())
    loaded = griffe.load("privet.mechanism", search_paths=[ROOT / "src"], extensions=extensions)
    sections = loaded["Mechanism"].docstring.parse("google")
    assert "examples" in {section.kind.value for section in sections}


def test_a_tree_keeps_its_lines():
    written = "A tree.\n\nroot\n├── one\n└── two\n\nAfter it."
    assert docs_examples.shown(written) == "A tree.\n\n    root\n    ├── one\n    └── two\n\nAfter it."
    assert docs_examples.shown("Nothing.\n\nTo draw.\n") == "Nothing.\n\nTo draw.\n"
