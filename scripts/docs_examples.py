"""An extension of griffe: docstrings that read well as text are shown well as pages.

The section `Example:` is shown as code, as griffe shows `Examples:`, and a paragraph that draws a tree keeps its lines.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)


def shown(docstring: str) -> str:
    """Returns the docstring as griffe shows it well."""
    paragraphs = HEADING.sub(r"\1Examples:", docstring).split("\n\n")
    return "\n\n".join(textwrap.indent(each, "    ") if "├──" in each else each for each in paragraphs)


class ExampleSections(griffe.Extension):
    """Changes docstrings on their way to the page."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object, as griffe holds it."""
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
