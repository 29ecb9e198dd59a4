"""Answers of unedited models, kept on disk: what a model said before is asked once.

One sqlite file for each model, dtype, and version of the libraries and of this one. It is a cache:
whatever goes wrong with it makes asking slower, never wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from knowpatch.files import cache_folder, source_digest
from knowpatch.models.view import ModelView

AT_ONCE = 500
"""Keys looked up in one statement."""


class Answers:
    """What one unedited model answers, by key."""

    def __init__(self, view: ModelView) -> None:
        made_by = [view.fingerprint, view.form, str(view.device.type), list(view.stop_ids)]
        versions = [torch.__version__, transformers.__version__, source_digest()]
        name = hashlib.sha256(json.dumps([1, *made_by, *versions]).encode()).hexdigest()[:32]
        self.path = Path(cache_folder() / "answers" / f"{name}.sqlite")

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """The kept answers among `keys`."""
        found: dict[str, Any] = {}
        with contextlib.suppress(sqlite3.Error, OSError, ValueError):
            if self.path.is_file():
                self._look_up(keys, found)
        return found

    def _look_up(self, keys: Sequence[str], found: dict[str, Any]) -> None:
        with self._open() as store:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"select key, answer, sum from answers where key in ({marks})"
                for key, text, total in store.execute(query, some):
                    if total == _sum(key, text):
                        found[key] = json.loads(text)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep `answers`."""
        with contextlib.suppress(sqlite3.Error, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as store:
                store.execute("create table if not exists answers (key primary key, answer, sum)")
                texts = {key: json.dumps(answer) for key, answer in answers.items()}
                rows = [(key, text, _sum(key, text)) for key, text in texts.items()]
                store.executemany("insert or replace into answers values (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        store = sqlite3.connect(self.path, timeout=5)
        try:
            with store:
                yield store
        finally:
            store.close()


def _sum(key: str, text: object) -> str:
    """What tells a damaged answer from a kept one."""
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()


def key_of(question: Sequence[Any]) -> str:
    """The key of a question: a hash of the plain data that it is."""
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()
