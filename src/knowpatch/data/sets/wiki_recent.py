"""WikiData_recent of KnowEdit: facts that Wikidata has gained since July 2022, to be inserted.

The facts come from the RECENT part of RippleEdits (arXiv 2307.12976). Prompts are the beginnings of
sentences that the target completes; there is no old answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import Case
from knowpatch.data.dataset import Files, register
from knowpatch.data.knowedit import KnowEdit, wiki_case
from knowpatch.data.records import records


@register("wiki_recent")
class WikiRecent(KnowEdit):
    """New facts about the world."""

    name = "wiki_recent"
    about = "new facts of Wikidata, with questions about what follows from them"
    kind = "insert"
    files: ClassVar[Files] = {
        "train": ["KnowEdit/benchmark/wiki_recent/recent_train.json"],
        "test": ["KnowEdit/benchmark/wiki_recent/recent_test.json"],
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield wiki_case(record, "insert")
