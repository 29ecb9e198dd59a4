"""PersonalityEdit (arXiv 2310.02168): the personality trait that opinions about an entity show.

A record has an entity and texts about it for each of three traits of the Big Five. The wanted trait
is `target_per`; where the file does not say (train, dev) it is drawn by the entity's hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from knowpatch.data.case import OPPOSITE, SAME, Case, accepted
from knowpatch.data.dataset import Dataset, Files, register
from knowpatch.data.draft import Draft
from knowpatch.data.records import Record, drawn, first, opinion_of, records
from knowpatch.errors import DataError, did_you_mean

TRAITS = ("extraversion", "agreeableness", "neuroticism")


@register("personality")
class Personality(Dataset):
    """Personality traits in opinions."""

    name = "personality"
    about = "the personality trait that an opinion about an entity shows"
    paper = "arXiv 2310.02168"
    kind = "modify"
    files: ClassVar[Files] = {
        split: [f"personality/PersonalityEdit_{split}.json"] for split in ("train", "dev", "test")
    }

    def cases(self, *contents: Any) -> Iterator[Case]:
        for record in records(contents[0]):
            yield _case(record)


def _case(record: Record) -> Case:
    draft = Draft(record.named("case_id"))
    entity = record.text("ent").strip()
    texts = {trait: record.texts(trait) for trait in TRAITS}
    wanted = record.text_or("target_per", drawn(entity, TRAITS))
    if wanted not in TRAITS:
        at, hint = record.at("target_per"), did_you_mean(wanted, TRAITS)
        raise DataError(f"{at}: unknown trait {wanted!r}: {hint}")
    question = opinion_of(entity)
    draft.edit(question, first(texts[wanted]), subject=entity)
    others = [text for trait in TRAITS if trait != wanted for text in texts[trait]]
    draft.ask(SAME, question, accepted(*texts[wanted]), request=0)
    draft.ask(OPPOSITE, question, accepted(*others), request=0)
    return draft.case()
