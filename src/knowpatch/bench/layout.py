"""What a table of the report is, and how it looks in Markdown; the page draws the same ones."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What stands in one place: a text, a smaller one below it, and whether it stands out."""

    text: str = ""
    small: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows below columns.

    Attributes:
        heads: how many columns, from the left, name the row; one or two.
        folded: whether the page shows it only when asked.
        wide: whether its last column holds long texts.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    heads: int = 1
    folded: bool = False
    wide: bool = False


def entries(*texts: object) -> tuple[Entry, ...]:
    return tuple(text if isinstance(text, Entry) else Entry(str(text)) for text in texts)


def markdown(table: Table) -> str:
    """The table in Markdown, whatever its texts hold."""
    lines = [f"### {plain_text(table.title)}", ""]
    lines.append("| " + " | ".join(plain_text(column) or " " for column in table.columns) + " |")
    lines.append("|" + "---|" * len(table.columns))
    for row in table.rows:
        lines.append("| " + " | ".join(_in_markdown(entry) for entry in row) + " |")
    return "\n".join([*lines, ""])


def _in_markdown(entry: Entry) -> str:
    text = plain_text(entry.text)
    text = f"**{text}**" if entry.strong and text else text
    return f"{text} {plain_text(entry.small)}".strip()


def plain_text(text: str) -> str:
    """A text that Markdown shows as it is: on one line, nothing in it means anything."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    escaped = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escaped)
