"""A document as one HTML file that loads nothing from elsewhere: for screens, telephones and paper."""

from __future__ import annotations

from html import escape
from importlib import resources

from privet.report.document import Block, Bullets, Document, Paragraph, Table
from privet.report.plots import Plot

__all__ = ["html_of"]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<dl class="headline">{headline}</dl>
{sections}
</main>
</body>
</html>
"""


def html_of(document: Document) -> str:
    """Returns the document as HTML. Every text is escaped, so that none of it becomes markup."""
    headline = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in document.headline
    )
    sections = "\n".join(
        f"<section>\n<h2>{escape(section.title)}</h2>\n{''.join(map(_block, section.blocks))}</section>"
        for section in document.sections
    )
    style = resources.files("privet.report").joinpath("style.css").read_text(encoding="utf-8")
    return _PAGE.format(title=escape(document.title), style=style, headline=headline, sections=sections)


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        kind = ' class="warning" role="alert"' if block.strong else ""
        return f"<p{kind}>{escape(block.text)}</p>\n"
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>\n"
    if isinstance(block, Table):
        return _table(block)
    assert isinstance(block, Plot)
    return f"<figure>{block.to_svg()}<figcaption>{escape(block.caption)}</figcaption></figure>\n"


def _table(table: Table) -> str:
    """Returns a table that scrolls inside of the page where it is too wide; one without a header names its rows."""
    headed = any(table.header)
    cells = "".join(f'<th scope="col">{escape(each)}</th>' for each in table.header)
    head = f"<thead><tr>{cells}</tr></thead>"
    rows = []
    for first, *others in table.rows:
        cell = f"<td>{escape(first)}</td>" if headed else f'<th scope="row">{escape(first)}</th>'
        rows.append(f"<tr>{cell}{''.join(f'<td>{escape(each)}</td>' for each in others)}</tr>")
    body = f"<tbody>{''.join(rows)}</tbody>"
    opening = "<table>" if headed else '<table class="facts">'
    return f'<div class="scroll" tabindex="0">{opening}{head if headed else ""}{body}</table></div>\n'
