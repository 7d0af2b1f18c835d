"""A document as Markdown. Pictures become their captions: what they show stands in tables, and in the HTML form."""

from __future__ import annotations

import re

from privet.report.document import Block, Bullets, Document, Paragraph, Table
from privet.report.plots import Plot

__all__ = ["markdown_of"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$!])")


def markdown_of(document: Document) -> str:
    """Returns the document as Markdown. Every text is escaped, so that none of it becomes markup."""
    lines = [f"# {_text(document.title)}", ""]
    lines += [" · ".join(f"**{_text(name)}** {_text(value)}" for name, value in document.headline), ""]
    for section in document.sections:
        lines += [f"## {_text(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [f"**{_text(block.text)}**" if block.strong else _text(block.text)]
    if isinstance(block, Bullets):
        return [f"* {_text(item)}" for item in block.items]
    if isinstance(block, Table):
        header = [_row(block.header), f"|{'---|' * len(block.header)}"]
        return header + [_row(row) for row in block.rows]
    assert isinstance(block, Plot)
    return [f"*Picture in the HTML form: {_text(block.caption)}*"]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_text(cell) for cell in cells)} |"


def _text(text: str) -> str:
    """Returns a text on one line in which no character is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
