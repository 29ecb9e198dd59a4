"""Rows: what was found of each fact, kept in the cache folder as it comes, so that a run goes on.

A file there holds the rows of one way of looking, one JSON line for each fact; its name is the hash
of all that the rows depend on, the library's source included.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowpatch.files import append_lines, kept_in, source_digest, whole_lines, write_atomically
from knowpatch.locate.facts import Fact

Row = dict[str, Any]
EFFECTS = "effects"
"""What a row lacks that was dropped."""


class Rows:
    """The rows of one way of looking.

    Args:
        settings: what rows depend on besides the fact, as plain data.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        content = json.dumps([dict(settings), source_digest()], sort_keys=True)
        self.path = kept_in("traced", content, ".jsonl")
        self._found: dict[tuple[str, str], Row] = {}
        for line in whole_lines(self.path):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # then it is made again
                row = json.loads(line)
                self._found[row["prompt"], row["subject"]] = row

    def of(self, fact: Fact) -> Row | None:
        """What was found of a fact, if anything was, under the fact's own id."""
        row = self._found.get((fact.prompt, fact.subject))
        return None if row is None else {**row, "id": fact.id}

    def add(self, fact: Fact, row: Row) -> Row:
        """Keep what was found of a fact."""
        append_lines(self.path, [dumped(row)])
        self._found[fact.prompt, fact.subject] = row
        return row


def dumped(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_rows(path: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write rows to a file of JSON lines, the settings first; whole or not at all."""
    lines = [dumped({"settings": dict(settings)}), *(dumped(row) for row in rows)]
    return write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
