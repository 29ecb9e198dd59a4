"""ConvSent of KnowEdit: the sentiment that a model voices about an entity (SERAC, 2206.06520).

A record has an entity, and answers about it of positive and of negative sentiment. A case edits
towards one of the two, drawn by the entity's hash (the published code draws anew in every run); its
target is the first answer of that sentiment. What else should stay is asked about the next record's
entity, of the last record about the first one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import OPPOSITE, OTHER, SAME, Case, accepted
from knowpatch.data.dataset import Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.knowedit import KnowEdit
from knowpatch.data.records import Record, drawn, first, opinion_of, records

SENTIMENTS = ("pos", "neg")
NO_OTHER = "no other entity"


@register("convsent")
class ConvSent(KnowEdit):
    """Sentiments about entities."""

    name = "convsent"
    about = "the sentiment of what is said about an entity"
    paper = "arXiv 2206.06520; 2401.01286"
    kind = "modify"
    files: ClassVar[Files] = {
        "train": ["KnowEdit/benchmark/Convsent/blender_train.json"],
        "val": ["KnowEdit/benchmark/Convsent/blender_val.json"],
        "test": ["KnowEdit/benchmark/Convsent/blender_test.json"],
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        left = records(contents[0])
        start = this = next(left)
        for following in left:
            yield _case(this, following)
            this = following
        yield _case(this, start)


def _case(record: Record, other: Record) -> Case:
    draft = Draft(record.named("case_id"))
    entity = record.text("ent").strip()
    answers = {sentiment: record.texts(sentiment) for sentiment in SENTIMENTS}
    wanted = drawn(entity, SENTIMENTS)
    (unwanted,) = set(SENTIMENTS) - {wanted}
    question = opinion_of(entity)
    draft.edit(question, first(answers[wanted]), subject=entity)
    draft.ask(SAME, question, accepted(*answers[wanted]), request=0)
    draft.ask(OPPOSITE, question, accepted(*answers[unwanted]), request=0)
    stranger = other.text("ent").strip()
    if stranger == entity:
        draft.note(NO_OTHER)
    else:
        both = [text for sentiment in SENTIMENTS for text in other.texts(sentiment)]
        draft.ask(OTHER, opinion_of(stranger), accepted(*both))
    return draft.case()
