"""A catalogue of common relations: how each is stated and asked, and which phrases name it.

It ships with the library, in its own words (assets/relations.jsonl). A fact's relation is that
whose statement its prompt is, or whose phrase stands in it, else that whose statement means nearly
the same; a prompt that is none of these is a relation of its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

from knowpatch.parts.encoders import Encoder
from knowpatch.parts.spans import subject_span
from knowpatch.request import EditRequest

SLOT = "{}"
ALIKE = 0.6
"""Least cosine of two wordings of one relation, as published."""
GAP = r"\b[^;?.]{0,80}?\b"
"""What "..." in a phrase stands for."""
GAPPED = 8
"""Characters that a phrase with a gap counts less."""


@dataclass(frozen=True)
class Relation:
    """A relation.

    Attributes:
        id: its name.
        says, asks: a statement's beginning and a question, with a slot for the entity.
        phrases: that name it; "..." is a gap, "*" the rest of a word.
        of, gives: kinds of entity that it is of, and that it leads to; none where not known.
        through: relations that imply it one entity further on (a position its sport).
        instead: relations that are meant where the entity is of another kind (a sport is no citizen
            of a country, but has one of origin).
    """

    id: str
    says: str
    asks: str
    phrases: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()

    @cached_property
    def patterns(self) -> tuple[tuple[int, re.Pattern[str]], ...]:
        """The phrases as patterns, each with its length."""
        lengths = [len(phrase) - GAPPED * ("..." in phrase) for phrase in self.phrases]
        return tuple(zip(lengths, map(_pattern, self.phrases), strict=True))

    @property
    def title(self) -> str:
        """The name in words."""
        return self.id.replace("_", " ")


def _pattern(phrase: str) -> re.Pattern[str]:
    """Each part between gaps is a group."""
    parts = [_words(part) for part in phrase.split("...")]
    return re.compile(GAP.join(f"({part})" for part in parts), re.IGNORECASE)


def _words(part: str) -> str:
    words = [re.escape(word).replace(r"\*", r"\w*") for word in part.split()]
    return r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"


@dataclass(frozen=True)
class Named:
    """A phrase in a text that names a relation; spans of its parts, in order."""

    relation: Relation
    spans: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[0][1]


@cache
def catalogue() -> dict[str, Relation]:
    """The relations that ship with the library, by id."""
    file = resources.files("knowpatch").joinpath("assets", "relations.jsonl")
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    lists = ("phrases", "of", "gives", "through", "instead")
    return {
        row["id"]: Relation(
            row["id"], row["says"], row["asks"], *(tuple(row.get(name, ())) for name in lists)
        )
        for row in rows
    }


def meant(relation: Relation, kinds: Collection[str]) -> Relation | None:
    """The relation that is meant of something of these kinds (none: not known); None where that is
    what is wanted already."""
    if not kinds or not relation.of or set(relation.of) & set(kinds):
        return relation
    others = (catalogue()[one] for one in relation.instead)
    fits = next((one for one in others if set(one.of) & set(kinds)), None)
    return fits or (None if set(relation.gives) & set(kinds) else relation)


def own_relation(template: str) -> Relation:
    """A relation that the catalogue does not have: its template is all that is known of it."""
    around = [part.strip(" ,.:;'\"") for part in template.split(SLOT)]
    phrase = " ... ".join(filter(None, around))
    return Relation(template, template, template, (phrase,) if phrase else ())


def plain(text: str) -> str:
    """A text for comparing: compatible characters, no capitals, single blanks, no end."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(" .?!:")


def named_in(text: str, relations: Sequence[Relation]) -> list[Named]:
    """The phrases in a text that name relations, longest first, none over another; by place."""
    found = sorted(_all(text, relations), key=lambda one: (-one[0], one[1].start))
    taken: list[tuple[int, int]] = []
    kept = []
    for _, named in found:
        if not any(a < end and start < b for start, end in named.spans for a, b in taken):
            taken += named.spans
            kept.append(named)
    return sorted(kept, key=lambda named: named.start)


def _all(text: str, relations: Sequence[Relation]) -> Iterator[tuple[int, Named]]:
    for relation in relations:
        for length, pattern in relation.patterns:
            for match in pattern.finditer(text):
                spans = tuple(match.span(number) for number in range(1, pattern.groups + 1))
                yield length, Named(relation, spans)


def relation_of(template: str, encoder: Encoder) -> Relation:
    """The relation of facts whose prompts are `template`, the subject cut out."""
    known = tuple(catalogue().values())
    return _stated(template) or nearest(template, known, encoder) or own_relation(template)


def worded(template: str) -> Relation | None:
    """The relation whose statement or question a template is."""
    words = plain(template)
    known = catalogue().values()
    return next((one for one in known if words in (plain(one.says), plain(one.asks))), None)


def _stated(template: str) -> Relation | None:
    """The relation whose wording a template is, or whose phrase alone stands in it."""
    if relation := worded(template):
        return relation
    named = {one.relation.id: one.relation for one in named_in(template, [*catalogue().values()])}
    return next(iter(named.values())) if len(named) == 1 else None


def template_of(request: EditRequest) -> str | None:
    """A request's prompt with its subject cut out; None where it has none."""
    if request.subject is None:
        return None
    start, stop = subject_span(request.prompt, request.subject)
    return request.prompt[:start] + SLOT + request.prompt[stop:]


def asked_too(request: EditRequest) -> EditRequest:
    """The request with the questions that ask for it as rephrases, where its relation is known:
    sub-questions are questions, prompts are often statements."""
    template = template_of(request)
    relation = None if template is None else _stated(template)
    if relation is None or request.subject is None:
        return request
    wordings = (relation.asks, f"What is the {relation.title} of {SLOT}?")
    asked = tuple(wording.replace(SLOT, request.subject) for wording in wordings)
    return request.model_copy(update={"rephrases": (*request.rephrases, *asked)})


def written(words: str, relations: Sequence[Relation], encoder: Encoder) -> Relation:
    """The relation that someone names: by its title or one of its phrases, else by meaning."""
    for relation in relations:
        if plain(words) == relation.title:
            return relation
    named = {one.relation.id: one.relation for one in named_in(words, relations)}
    if len(named) == 1:
        return next(iter(named.values()))
    return nearest(words, relations, encoder) or own_relation(words)


def nearest(text: str, relations: Sequence[Relation], encoder: Encoder) -> Relation | None:
    """The relation whose statement or question means most nearly the same, if one does."""
    wordings = [wording for one in relations for wording in (one.says, one.asks)]
    vectors_NE = encoder.encode([text, *wordings])
    best = (vectors_NE[1:] @ vectors_NE[0]).max(0)
    return relations[int(best.indices) // 2] if float(best.values) >= ALIKE else None
