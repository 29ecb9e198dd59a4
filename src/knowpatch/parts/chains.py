"""Chains: which relations a question goes along, from an entity in it, read off its phrases.

"the capital of the country of citizenship of X's author": what X has comes first, then what stands
before X, the nearest first, then what follows; a relation that the question word asks for is last.
Where that order cannot be, since a kind of thing would come to a relation that it does not have (a
country to its director), the nearest order that can be is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache
from itertools import combinations, permutations

from knowpatch.parts.relations import Named, Relation, catalogue, meant, named_in

MARK = "\u2020"
"""Stands for the entity."""
HAS = re.compile(r"^(['’]s?)?\s+$")
"""Between an entity and what it has; some leave the apostrophe out."""
VERB = re.compile(
    r"""(is|was|were|has|have|had|holds?|held|belongs?|comes?|hails?|originat\w+|born|die[sd]?
    |plays|played|works?|studied|created|invented|founded|first|which|what|in|derive[sd]?)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""How a phrase begins that says what an entity does, not what it has."""
ASKED = re.compile(
    r"^\W*((in|on|at|to|from|of|for)\s+)?((which|what)(\s+(is|was)\s+the)?\s+)?$", re.IGNORECASE
)
"""Before what the question word asks for, which may be part of the phrase."""
CLAUSE = re.compile(r"\b(that|which|where|whom)\s+(the\s+)?$", re.IGNORECASE)
"""Before an entity of which a clause says what it does ("the company that X works for")."""
ARRANGED = 6
"""Relations of a chain that is put into another order at most."""
ACTORS = frozenset({"person", "character", "organisation", "team"})
WANTED = {
    "where": frozenset({"city", "region", "country", "continent"}),
    "who": ACTORS,
    "whom": ACTORS,
}
"""What a question's first word asks for."""


def marked(question: str, span: tuple[int, int]) -> str:
    """The question with a mark for the entity, quotation marks around it left out."""
    before, after = question[: span[0]], question[span[1] :]
    text = f"{before}{MARK}{after}"
    return re.sub(rf"[\"“”‘]?{MARK}((['’]s)?)[\"”’“]?", rf"{MARK}\1", text)


def chain_of(text: str, relations: Sequence[Relation]) -> list[Relation]:
    """The relations that a marked question names, from the entity on; none twice in a row."""
    found = named_in(text, relations)
    at = text.index(MARK)
    has = _had(text, at, found)
    rest = [named for named in found if named not in has]
    left = sorted((n for n in rest if n.start < at), key=lambda named: -named.start)
    right = [named for named in rest if named.start > at]
    last = [named for named in left if ASKED.match(text[: named.start])]
    ordered = [*has, *(n for n in left if n not in last), *right, *last]
    chain: list[Relation] = []
    for named in ordered:
        if not chain or chain[-1].id != named.relation.id:
            chain.append(named.relation)
    return chain


def _had(text: str, at: int, found: Sequence[Named]) -> list[Named]:
    """What stands right behind the entity as something that it has, and what that has."""
    has: list[Named] = []
    end = at + len(MARK)
    for named in found:
        owned = named.start > at and HAS.match(text[end : named.start])
        does = VERB.match(text[named.start :]) and not CLAUSE.search(text[:at])
        if owned and not does:
            has.append(named)
            end = named.end
    return has


def arranged(
    chain: Sequence[Relation], kinds: Collection[str], wanted: Collection[str]
) -> list[Relation]:
    """The chain in the order that its kinds allow, as it was read where they allow that.

    Fewest relations are out of place, of these fewest say nothing, then fewest are moved.

    Args:
        kinds: of the entity that it begins at; wanted: of the answer; empty where not known.
    """
    if not 1 < len(chain) <= ARRANGED or not any(_faults(chain, kinds, wanted)):
        return list(chain)

    def cost(order: tuple[int, ...]) -> tuple[int, int, int]:
        odd, idle = _faults([chain[n] for n in order], kinds, wanted)
        return odd, idle, sum(a > b for a, b in combinations(order, 2))

    return [chain[n] for n in min(permutations(range(len(chain))), key=cost)]


def _faults(
    chain: Sequence[Relation], kinds: Collection[str], wanted: Collection[str]
) -> tuple[int, int]:
    """How many relations do not fit what the ones before lead to, the end what is wanted; and how
    many say nothing, since what they lead to has been come to already."""
    odd, idle, at = 0, 0, set(kinds)
    for named in chain:
        relation = meant(named, at)
        if relation is None:
            idle += 1
            continue
        odd += bool(at and relation.of) and not at & set(relation.of)
        at = set(relation.gives)
    return odd + (bool(at and wanted) and not at & set(wanted)), idle


def wanted_in(question: str) -> frozenset[str]:
    """The kinds of thing that a question word asks for; none where that is not said."""
    if asked := _kind_asked().search(question):
        return frozenset({asked[1].lower()})
    first = re.match(r"\W*(\w*)", question)
    return WANTED.get(first[1].lower() if first else "", frozenset())


@cache
def _kind_asked() -> re.Pattern[str]:
    """Such as "which city", "what is the official language", not "which country's"."""
    kinds = "|".join(sorted({kind for one in catalogue().values() for kind in one.gives}))
    is_the = r"(?:\s+(?:is|was)\s+the(?:\s+name\s+of\s+the)?)?"
    return re.compile(rf"\b(?:which|what){is_the}\s+(?:\w+\s+)?({kinds})\b(?!['’])", re.IGNORECASE)
