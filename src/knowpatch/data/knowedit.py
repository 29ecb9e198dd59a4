"""What the six sets of KnowEdit (arXiv 2401.01286) share: their home, and their record layout.

Questions about what else should change (portability) or stay (locality) lie in an object with a
list for each sub-kind, of objects with `prompt` and `ground_truth`.
"""

from __future__ import annotations

from typing import ClassVar

from knowpatch.data.case import Case
from knowpatch.data.dataset import Dataset, Hub
from knowpatch.data.draft import Draft
from knowpatch.data.records import GROUPS, Record, checked_kind
from knowpatch.request import Kind

UNRELATED = "unrelated"
"""The sub-kind of questions in a bare list."""
PLAIN = "answers are plain text, without aliases"


class KnowEdit(Dataset):
    """A set of KnowEdit, whose files the hub has."""

    suite: ClassVar[str | None] = "knowedit"
    hub: ClassVar[Hub | None] = Hub(
        "zjunlp/KnowEdit", "c3a6bccb5fc37a59dea3197ac36526d44606acd0", folder="KnowEdit"
    )
    paper = "arXiv 2401.01286"


def ask_grouped(draft: Draft, record: Record, group: str) -> bool:
    """Enter the questions of `group`; a note if there are none.

    Returns:
        Whether an answer is plain text, where others are lists of aliases.
    """
    bare = isinstance(record.fields.get(group), list)
    found = record.fields[group] if group in record else {}
    groups = Record({UNRELATED: found} if bare else found, record.at(group))
    count, plain = 0, False
    for sub_kind in groups.fields:
        kind = checked_kind(f"{group}.{sub_kind}", record.at(group))
        for query in groups.inners(sub_kind):
            count += 1
            plain = plain or isinstance(query.get("ground_truth"), str)
            draft.ask(kind, query.text("prompt"), query.answers("ground_truth"))
    if not count:
        draft.note(f"no {group}")
    return plain


def wiki_case(record: Record, kind: Kind, old: str | None = None) -> Case:
    """The case of a record of the two Wikidata sets."""
    draft = Draft(record.named("case_id"))
    draft.edit(
        record.text("prompt"),
        record.text("target_new"),
        subject=record.text_or("subject", ""),
        old=old,
        kind=kind,
    )
    plain = [ask_grouped(draft, record, group) for group in GROUPS]
    if any(plain):
        draft.note(PLAIN)
    return draft.case()
