"""CounterFact (ROME, arXiv 2202.05262): false facts, with neighbours for which the true one stays.

Three published formats, told apart by their keys:

* flattened (`target_new` beside `prompt`, one rephrase, one neighbour): splits edit, train, val;
* the original nested one (`requested_rewrite` with a template, two paraphrases, ten neighbours),
  here with neighbours behind a distracting sentence, a question that follows from the edit and one
  about the subject's other properties (arXiv 2305.13172): split distracting;
* the original one with another name of the subject (arXiv 2305.13172): split subject_replace.

A neighbour is another subject with the same true object. Prompts for free generation, and those of
subjects that have the new object anyway, have no place in a case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import LOCALITY, NEIGHBOUR, PORTABILITY, Case, accepted
from knowpatch.data.dataset import Dataset, Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.records import Record, filled, records

DISTRACTING = f"{LOCALITY}.distracting"
SPECIFICITY = f"{LOCALITY}.Relation_Specificity"
ALIASING, REASONING = f"{PORTABILITY}.Subject_Aliasing", f"{PORTABILITY}.Reasoning"


@register("counterfact")
class CounterFact(Dataset):
    """False facts with neighbours."""

    name = "counterfact"
    about = "false facts, and neighbours for which the true ones stay"
    paper = "arXiv 2202.05262; 2305.13172"
    kind = "modify"
    files: ClassVar[Files] = {
        "edit": ["counterfact/counterfact-edit.json"],
        "train": ["counterfact/counterfact-train.json"],
        "val": ["counterfact/counterfact-val.json"],
        "distracting": ["counterfact/counterfact_distracting_neighbor.json"],
        "subject_replace": ["counterfact/counterfact_subject_replace.json"],
    }
    default_split = "edit"

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield _nested(record) if "requested_rewrite" in record else _flat(record)


def _flat(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    number = draft.edit(
        record.text("prompt"),
        record.text("target_new"),
        subject=record.text_or("subject", ""),
        old=record.text_or("ground_truth", ""),
    )
    if "rephrase_prompt" in record:
        draft.rephrase(record.texts("rephrase_prompt"), number)
    if "locality_prompt" in record:
        draft.ask(
            NEIGHBOUR, record.text("locality_prompt"), record.answers("locality_ground_truth")
        )
    return draft.case()


def _nested(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    rewrite = record.inner("requested_rewrite")
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    new, true = (rewrite.inner(name).text("str") for name in ("target_new", "target_true"))
    number = draft.edit(filled(template, subject), new, subject=subject, old=true)
    if "paraphrase_prompts" in record:
        draft.rephrase(record.texts("paraphrase_prompts"), number)
    if "alternative_subject" in record:
        alias = record.text("alternative_subject")
        draft.ask(ALIASING, filled(template, alias), accepted(new), request=number)
    neighbours = {
        "neighborhood_prompts": NEIGHBOUR,
        "distracting_neighborhood_prompts": DISTRACTING,
    }
    for name, kind in neighbours.items():
        for prompt in record.texts(name) if name in record else ():
            draft.ask(kind, prompt, accepted(true))
    if "portability" in record:
        follows = record.inner("portability")
        draft.ask(REASONING, follows.text("New Question"), follows.answers("New Answer"))
    if "unrelated_relation" in record:
        other = record.inner("unrelated_relation")
        draft.ask(SPECIFICITY, other.text("question"), other.answers("object"))
    return draft.case()
