"""PitfallsKnowledgeEditing (arXiv 2310.02129): edits that distort, and edits that contradict.

Splits easy and hard: a subject has several true objects, one of which is edited to a new one; the
others ought to stay (and after an edit back to the old one, all of them). Split reverse: two edits
that follow one another, the second of which contradicts what follows from the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import LOCALITY, Case, accepted
from knowpatch.data.dataset import Dataset, Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.records import Record, filled, records

OTHER_OBJECTS = f"{LOCALITY}.other_objects"


@register("conflict")
class Conflict(Dataset):
    """Edits that distort or contradict."""

    name = "conflict"
    about = "edits among several true objects (easy, hard), and edits that contradict (reverse)"
    paper = "arXiv 2310.02129"
    kind = "modify"
    files: ClassVar[Files] = {
        "easy": ["conflict/easy.json"],
        "hard": ["conflict/hard.json"],
        "reverse": ["conflict/reverse_edit.json"],
    }
    default_split = "easy"

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield _chain(record) if "edits" in record else _one_of_many(record)


def _edit(draft: Draft, edit: Record) -> None:
    relation, subject = edit.inner("relation"), edit.inner("subject").text("label")
    number = draft.edit(
        filled(relation.text("prompt"), subject),
        edit.inner("new_object").text("label"),
        subject=subject,
        old=edit.inner("object").text("label"),
    )
    draft.rephrase([filled(relation.text("query"), subject)], number)


def _one_of_many(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    edit = record.inner("edit")
    _edit(draft, edit)
    old = edit.inner("object").text("label")
    objects = [item.text("label") for item in record.inners("true_objects")]
    others = [label for label in dict.fromkeys(objects) if label != old]
    prompt = filled(edit.inner("relation").text("prompt"), edit.inner("subject").text("label"))
    if others:
        draft.ask(OTHER_OBJECTS, prompt, accepted(*others), request=0)
    else:
        draft.note("no other objects")
    return draft.case()


def _chain(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    edits = record.inners("edits")
    for edit in edits:
        _edit(draft, edit)
    if not edits:
        draft.unusable = "no request"
    return draft.case()
