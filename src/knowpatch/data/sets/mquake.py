"""MQuAKE (arXiv 2305.14795): several edits at once, and questions that need a chain of them.

A case has up to four requests; its question, in three wordings, is answered by following the chain
of facts after the edits. Each single hop of the chain is asked as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import HOP, MULTIHOP, Answers, Case
from knowpatch.data.dataset import Dataset, Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.records import Record, filled, records

REPEATED = "two requests edit the same subject and prompt; the last one is taken"


@register("mquake")
class Mquake(Dataset):
    """Chains of edited facts."""

    name = "mquake"
    about = "questions that need a chain of edited facts"
    paper = "arXiv 2305.14795"
    kind = "modify"
    files: ClassVar[Files] = {"hard": ["mquake/MQuAKE-hard.json"]}
    default_split = "hard"

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield _case(record)


def _case(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    rewrites: dict[str, Record] = {}
    for rewrite in record.inners("requested_rewrite"):
        prompt = filled(rewrite.text("prompt"), rewrite.text("subject"))
        if prompt in rewrites:
            draft.note(REPEATED)
        rewrites[prompt] = rewrite
    for prompt, rewrite in rewrites.items():
        new, true = (rewrite.inner(name).text("str") for name in ("target_new", "target_true"))
        draft.edit(prompt, new, subject=rewrite.text("subject"), old=true)
    if not rewrites:
        draft.unusable = "no request"
    for question in record.texts("questions"):
        draft.ask(MULTIHOP, question, _answers(record, "new_answer"))
    for hop in record.inners("new_single_hops"):
        draft.ask(HOP, hop.text("question"), _answers(hop, "answer"))
    return draft.case()


def _answers(record: Record, name: str) -> Answers:
    """One answer: its name, then its aliases."""
    aliases = record.texts(f"{name}_alias") if f"{name}_alias" in record else []
    return ((record.text(name), *aliases),)
