"""Sanitation of KnowEdit: questions of TriviaQA whose answer a model should no longer give.

There are five answers to forget, each with sixteen questions to train on and sixteen others to test
with. A case is one answer: its requests are the training file's questions (`K_F`), what should be
gone is asked by the test file's (`success`), what should stay by `locality` (in the training file:
`K_R`). Answers are compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import FORGET, RETAIN, Case
from knowpatch.data.dataset import Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.knowedit import KnowEdit
from knowpatch.data.records import Record, records
from knowpatch.request import REFUSAL

NOTHING = "no question of the training file has this answer"
NOT_TESTED = "no question of the test file has this answer"
TRAIN = "KnowEdit/benchmark/trivia/trivia_qa_train.json"
TEST = "KnowEdit/benchmark/trivia/trivia_qa_test.json"


@register("sanitation")
class Sanitation(KnowEdit):
    """Answers to forget."""

    name = "sanitation"
    about = "answers to forget, and others to keep"
    kind = "erase"
    files: ClassVar[Files] = {"train": [TRAIN], "test": [TRAIN, TEST]}

    def cases(self, *contents: Any) -> Iterator[Case]:
        train = Record(contents[0], "the training file")
        edits = _by_answer(train, "K_F")
        if len(contents) > 1:
            test = Record(contents[1], "the test file")
            asked, kept = _by_answer(test, "success"), _listed(test, "locality")
        else:
            asked, kept = {}, _listed(train, "K_R")
        for answer in dict.fromkeys([*edits, *asked]):
            draft = Draft(answer)
            if answer not in edits:
                draft.unusable = NOTHING
            elif asked and answer not in asked:
                draft.note(NOT_TESTED)
            for record in edits.get(answer, ()):
                _edit(draft, record)
            for kind, questions in ((FORGET, asked.get(answer, [])), (RETAIN, kept)):
                for record in questions:
                    draft.ask(kind, _prompt(record), record.answers("ground_truth"))
            yield draft.case()


def _listed(content: Record, name: str) -> list[Record]:
    return list(records(content.get(name), f"question of {name}"))


def _by_answer(content: Record, name: str) -> dict[str, list[Record]]:
    """The questions of a list by their answer, in lower case."""
    found: dict[str, list[Record]] = {}
    for record in _listed(content, name):
        found.setdefault(record.text("ground_truth").strip().lower(), []).append(record)
    return found


def _prompt(record: Record) -> str:
    return f"Question: {record.text('question')}\nAnswer:"


def _edit(draft: Draft, record: Record) -> None:
    draft.edit(
        _prompt(record),
        record.text_or("target_new", REFUSAL),
        subject=record.text_or("subject", ""),
        old=record.text("ground_truth"),
        kind="erase",
    )
