"""Known facts (ROME, arXiv 2202.05262): prompts that GPT-2 completes rightly, for causal tracing.

There is nothing to edit: a case has no request, and one probe with the attribute as its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import REWRITE, Case
from knowpatch.data.dataset import Dataset, Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.records import records


@register("known_facts")
class KnownFacts(Dataset):
    """Facts that models know."""

    name = "known_facts"
    about = "facts that many models know, for tracing where; nothing to edit"
    paper = "arXiv 2202.05262"
    kind = "none"
    files: ClassVar[Files] = {"all": ["known_facts_600.json"]}
    default_split = "all"

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            draft = Draft(record.named("known_id"))
            draft.ask(
                REWRITE,
                record.text("prompt"),
                record.answers("attribute"),
                subject=record.text("subject"),
            )
            yield draft.case()
