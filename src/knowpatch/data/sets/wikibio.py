"""WikiBio of KnowEdit: the next sentence of a biography, in place of a hallucinated one.

The prompt is the passage so far (`text`), the target the sentence that should follow (`labels`),
the subject the person (`concept`, in lower case), spelt as the passage spells it. One person has
many records. There is nothing to ask about what follows, and no old answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import LOCALITY, Case
from knowpatch.data.dataset import Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.knowedit import KnowEdit, ask_grouped
from knowpatch.data.records import Record, records


@register("wikibio")
class WikiBio(KnowEdit):
    """Sentences of biographies."""

    name = "wikibio"
    about = "the next sentence of a biography, where a model made one up"
    kind = "modify"
    files: ClassVar[Files] = {
        "train": ["KnowEdit/benchmark/WikiBio/wikibio-train-all.json"],
        "test": ["KnowEdit/benchmark/WikiBio/wikibio-test-all.json"],
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield _case(record)


def _case(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    text = record.text("text")
    concept = record.text_or("concept", "").strip()
    found = re.search(re.escape(concept), text, re.IGNORECASE)
    subject = found.group() if found else concept
    draft.edit(text, record.text("labels"), subject=subject)
    ask_grouped(draft, record, LOCALITY)
    return draft.case()
