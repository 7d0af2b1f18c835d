"""Hooks of MkDocs: pages that lie outside of `docs/` join the site, and links to them are led there.

The pages link to each other as files of the repository, so that they can be read there as well. What lies outside of
`docs/` (results, examples, the changelog) gets a place under `repository/` in the site; a Python file becomes a page
that shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
AREA = "repository"
SHOWN = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE"),
    *("benchmarks/results/*.md", "benchmarks/results/*.png", "benchmarks/choosing.py", "examples/*.py"),
)
LISTED = {"benchmarks/results": "Measurements", "examples": "Example scripts"}
FIRST_PAGES = ("docs/decisions", "docs/extending", "docs/howto", "docs/reference")
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def shown_files() -> list[Path]:
    """Returns the files outside of docs/ that the site shows."""
    return [path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)) if path.name != "__init__.py"]


def address(path: str) -> str:
    """Returns where a file of the repository, by its path there, lies in the site, by its path under docs/."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in LISTED:
        return f"{AREA}/{path}/index.md"
    return f"{AREA}/{path}" if path.endswith((".md", ".png")) else f"{AREA}/{path}.md"


def origin(address_in_site: str) -> str:
    """Returns the path in the repository of what lies at an address in the site: the inverse of `address`."""
    if not address_in_site.startswith(f"{AREA}/"):
        return f"docs/{address_in_site}"
    path = address_in_site.removeprefix(f"{AREA}/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def content(path: Path) -> str:
    """Returns a file as a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    language = "python" if path.suffix == ".py" else "text"
    return f"# `{path.relative_to(ROOT).as_posix()}`\n\n``````{language}\n{text}``````\n"


def listing(folder: str) -> str:
    """Returns a page that lists the pages of a folder, with the first line that each file says of itself."""
    lines = [f"# {LISTED[folder]}\n"]
    for path in shown_files():
        if path.parent == ROOT / folder and path.suffix != ".png":
            first = path.read_text(encoding="utf-8").lstrip('#" ').splitlines()[0]
            lines.append(f"* [{path.name}]({posixpath.basename(address(f'{folder}/{path.name}'))}): {first}")
    return "\n".join(lines) + "\n"


def expanded(item: Any) -> Any:
    """Returns a part of the navigation in which a folder is the list of its pages."""
    if isinstance(item, list):
        return [expanded(each) for each in item]
    if isinstance(item, dict):
        return {title: expanded(each) for title, each in item.items()}
    if not str(item).endswith("/"):
        return item
    folder = origin(f"{item}index.md").removesuffix("/index.md").removesuffix("/index")
    first = [address(folder)] if folder in LISTED else []
    return first + [address(f"{folder}/{path.name}") for path in sorted((ROOT / folder).iterdir())
                    if path.suffix in {".md", ".py"} and path.name != "__init__.py"]  # fmt: skip


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replaces folders in the navigation by their pages."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs/ to the site."""
    for path in shown_files():
        place = address(path.relative_to(ROOT).as_posix())
        if path.suffix == ".png":
            files.append(File.generated(config, place, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, place, content=content(path)))
    for folder in LISTED:
        files.append(File.generated(config, address(folder), content=listing(folder)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links between files of the repository to their places in the site."""
    here = page.file.src_uri
    if here.endswith((".py.md", "/index.md")):
        return markdown

    def led(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin(here)), match[1]))
        if not (ROOT / path).exists():
            return match[0]  # MkDocs names it
        if path == "docs":
            path = "docs/README.md"
        elif path in FIRST_PAGES:
            path = f"{path}/{min(found.name for found in (ROOT / path).glob('*.md'))}"
        return posixpath.relpath(address(path), posixpath.dirname(here) or ".") + (match[2] or "")

    return LINK.sub(led, markdown)
