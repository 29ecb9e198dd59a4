"""zsRE: questions about Wikidata relations, and another answer than the true one.

Three published formats, told apart by their keys:

* KnowEdit's (`prompt`, `rephrase_prompt`, grouped `portability` and `locality`): split test;
* a structured one (`{"records": [...]}`, lists of rephrases and of unrelated questions):
  split structured;
* MEND's (arXiv 2110.11309; `src`, `alt`, `answers`, `rephrase`, `loc`, `loc_ans`), in the version
  with an `inverse question`, whose answer is the subject: split inverse. `pred` there is what some
  model said, not what is true, so that the old answer is the first of `answers`.

Unrelated questions keep the "nq question: " that some files begin them with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import LOCALITY, PORTABILITY, Case, accepted
from knowpatch.data.dataset import Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.knowedit import UNRELATED, KnowEdit, ask_grouped
from knowpatch.data.records import GROUPS, Record, first, records

INVERSE = f"{PORTABILITY}.Logical_Generalization"


@register("zsre")
class Zsre(KnowEdit):
    """Questions with another answer than the true one."""

    name = "zsre"
    about = "questions about relations of Wikidata, to be answered otherwise"
    paper = "arXiv 1706.04115; 2401.01286"
    kind = "modify"
    files: ClassVar[Files] = {
        "test": ["KnowEdit/benchmark/ZsRE/ZsRE-test-all.json"],
        "structured": ["zsre/zsre_500.json"],
        "inverse": ["zsre/zsre_inverse_relation.json"],
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        content = contents[0]
        if isinstance(content, dict):
            content = Record(content, "the file").get("records")
        for record in records(content):
            yield _mend(record) if "src" in record else _named(record)


def _named(record: Record) -> Case:
    """KnowEdit's format and the structured one, which differ in how questions are grouped."""
    draft = Draft(record.named("case_id"))
    number = draft.edit(
        record.text("prompt"),
        record.text("target_new"),
        subject=record.text_or("subject", ""),
        old=first(record.texts("ground_truth")) if "ground_truth" in record else "",
    )
    if "rephrase_prompt" in record:
        draft.rephrase(record.texts("rephrase_prompt"), number)
    for group in GROUPS:
        ask_grouped(draft, record, group)
    return draft.case()


def _mend(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    subject = record.text_or("subject", "")
    number = draft.edit(
        record.text("src"),
        record.text("alt"),
        subject=subject,
        old=first(record.texts("answers")) if "answers" in record else "",
    )
    if "rephrase" in record:
        draft.rephrase(record.texts("rephrase"), number)
    if "inverse question" in record:
        draft.ask(INVERSE, record.text("inverse question"), accepted(subject))
    if "loc" in record:
        draft.ask(f"{LOCALITY}.{UNRELATED}", record.text("loc"), record.answers("loc_ans"))
    return draft.case()
