"""Other wordings of a fact: those that come with its request, and those that its relation has.

A value that is optimised behind one wording answers that wording best. The library knows some
common relations (assets/wordings.jsonl, in its own words: phrases that tell which relation a prompt
is of, and statements of it that end where the answer begins). A prompt that none or several of them
fit has only the wordings that are given with it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources

from knowpatch.parts.relations import SLOT, Relation, named_in, plain, template_of
from knowpatch.parts.spans import in_word, subject_span, subject_spans
from knowpatch.request import EditRequest

CHAINED = re.compile(r"\bof (the )?$", re.IGNORECASE)
"""Before a phrase that only leads to what is asked for (the mayor of the capital of)."""


@cache
def _known() -> tuple[tuple[Relation, tuple[str, ...]], ...]:
    """The relations with their wordings."""
    file = resources.files("knowpatch").joinpath("assets", "wordings.jsonl")
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return tuple(
        (Relation(row["id"], row["wordings"][0], "", tuple(row["phrases"])), tuple(row["wordings"]))
        for row in rows
    )


def wordings_of(template: str) -> tuple[str, ...]:
    """How else the relation is put that a template states, with a slot for the subject."""
    named = named_in(template, [relation for relation, _ in _known()])
    if any(CHAINED.search(template[: one.start]) for one in named):
        return ()
    told = {one.relation.id for one in named}
    found = [wordings for relation, wordings in _known() if told == {relation.id}]
    return tuple(text for one in found for text in one if plain(text) != plain(template))


def reworded(request: EditRequest) -> tuple[str, ...]:
    """A request's prompt in other words, its subject in them: given ones, then the relation's."""
    template = template_of(request)
    counted = any(letter.isdigit() for letter in request.target)  # a day, a year, a number
    found = () if template is None or counted else wordings_of(template)
    filled = (text.replace(SLOT, request.subject or "") for text in found)
    given = (text for text in request.rephrases if _names(text, request))
    return tuple(dict.fromkeys((*given, *filled)))


def _names(text: str, request: EditRequest) -> bool:
    """Whether a text names the subject as the prompt does: as words of their own, if it is so."""
    subject, prompt = request.subject or "", request.prompt
    found = subject_spans(text, subject)
    return bool(found) and in_word(text, found[0]) <= in_word(prompt, subject_span(prompt, subject))
