"""Context: the edits as text, for models whose weights one cannot touch.

A text file is a system prompt with all facts; a .jsonl file is a retrieval corpus, one edit a line,
whose `text` is to be put before questions that it is about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knowpatch.errors import InputError
from knowpatch.export.parity import Question
from knowpatch.export.target import Base, Cargo, Target
from knowpatch.models.view import ModelView
from knowpatch.parts.factbook import newest, said
from knowpatch.parts.prompting.facts import sentence
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

LINES = ".jsonl"
ROOM = 32
"""Tokens that a prompt must leave for a question and its answer."""
HEAD = (
    "Take the following as true. It replaces what you have learned otherwise; use it where a "
    "question is about it, and answer all other questions as ever."
)


@dataclass(frozen=True)
class Context(Target):
    """The edits as text."""

    name = "context"
    about = "the edits as a system prompt, or (a .jsonl file) as texts to be retrieved"
    reader = "the unedited model, with the text before the question"
    weights = False

    @classmethod
    def refuses(cls, patch: Patch) -> str | None:
        return None if patch.provenance.requests else "says of no request what it was made from"

    def write(self, cargo: Cargo, place: Path) -> list[str]:
        requests = requests_of(cargo.patches)
        content = lines(requests) if _retrieved(cargo.path) else prompt(requests)
        if not _retrieved(cargo.path):
            _check_length(content, cargo.model.view)
        place.write_text(content, encoding="utf-8")
        count = len(requests)
        return [f"{count} fact{'s' * (count > 1)}, {len(content.encode())} bytes of text"]

    def read(self, base: Base, path: Path) -> ModelView:
        return base.load()

    def asked(self, questions: Sequence[Question], path: Path) -> list[Question]:
        """With the whole prompt before each, or before each edit the line that it is found by."""
        content = path.read_text(encoding="utf-8")
        if not _retrieved(path):
            return [replace(question, before=f"{content}\n") for question in questions]
        records = [json.loads(line) for line in content.split("\n") if line]
        texts = {record["prompt"]: record["text"] for record in records}
        return [
            replace(question, before=f"{texts[question.prompt]}\n") if question.answer else question
            for question in questions
        ]


def _check_length(content: str, view: ModelView) -> None:
    """InputError for a prompt that fills the model's context and more."""
    tokens, most = len(view.encode(content).ids), view.limits.positions
    if most is not None and tokens > most - ROOM:
        raise InputError(
            f"the facts are {tokens} tokens, and {view.source} reads {most} in all: name a file "
            f"ending in {LINES}, for texts to be retrieved"
        )


def _retrieved(path: Path) -> bool:
    return path.suffix.lower() == LINES


def requests_of(patches: Sequence[Patch]) -> list[EditRequest]:
    """All edits, oldest first; of one prompt the newest."""
    return newest([request for patch in patches for request in patch.provenance.requests])


def told(request: EditRequest) -> str:
    """One edit as a sentence of its own."""
    if request.kind == "erase":
        return f'If asked "{request.prompt}", answer: {request.target}'
    if request.prompt.rstrip().endswith(("?", ":")):
        return f"{request.prompt.rstrip()} {request.target}"
    return sentence(said(request.prompt, request.target))


def prompt(requests: Sequence[EditRequest]) -> str:
    """All edits as a system prompt."""
    return "\n".join([HEAD, "", *(f"- {told(request)}" for request in requests), ""])


def lines(requests: Sequence[EditRequest]) -> str:
    """Each edit as a JSON object on a line: its request, and the text that tells it."""
    return "".join(
        json.dumps({**request.model_dump(mode="json"), "text": told(request)}, ensure_ascii=False)
        + "\n"
        for request in requests
    )
