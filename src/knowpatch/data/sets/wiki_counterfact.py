"""WikiData_counterfact of KnowEdit: false facts about popular entities, in place of true ones.

As in WikiData_recent, but with the true object as the old answer. In the training file the answers
are plain text, in the test file lists of alias lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import Case
from knowpatch.data.dataset import Files, register
from knowpatch.data.knowedit import KnowEdit, wiki_case
from knowpatch.data.records import records


@register("wiki_counterfact")
class WikiCounterfact(KnowEdit):
    """False facts about popular entities."""

    name = "wiki_counterfact"
    about = "false facts about popular entities, with questions about what follows from them"
    kind = "modify"
    files: ClassVar[Files] = {
        "train": ["KnowEdit/benchmark/wiki_counterfact/train_cf.json"],
        "test": ["KnowEdit/benchmark/wiki_counterfact/test_cf.json"],
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield wiki_case(record, "modify", record.text_or("ground_truth", ""))
