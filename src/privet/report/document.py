"""What a report is made of, before it is written in any language: sections of paragraphs, lists, tables, pictures.

Every text in it is plain. Only the writers know how to escape it, and they escape all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from privet.report.plots import Plot

__all__ = ["Block", "Bullets", "Document", "Paragraph", "Section", "Table"]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `strong` where a reader must not miss it."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table. Every row has as many cells as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "a row has another number of cells"


Block: TypeAlias = Paragraph | Bullets | Table | Plot


@dataclass(frozen=True)
class Section:
    """A section under its title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A title, a headline of a few figures, and sections."""

    title: str
    headline: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...] = field(default=())
