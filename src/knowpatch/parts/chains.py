"""Chains: which relations a question goes along, from an entity in it, read off its phrases.

"the capital of the country of citizenship of X's author": what X has comes first, then what stands
before X, the nearest first, then what follows; a relation that the question word asks for is last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from knowpatch.parts.relations import Named, Relation, named_in

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
