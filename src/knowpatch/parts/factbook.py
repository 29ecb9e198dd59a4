"""A book of facts, and the fact that a question is about: exact search over sentence vectors.

A fact is found by its prompt and by its rephrases, each a key of its own; a question is read whole
and by its last sentence alone, since what stands before that is often about something else, and the
nearer of the two counts. Questions and prompts are embedded alike, as they are: neither with its
answer nor in a template. Axes: N keys, F facts, Q readings of a question, E size of a vector.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from knowpatch.errors import PatchError
from knowpatch.parts.encoders import Encoder
from knowpatch.parts.spans import separator
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)

Fact = Mapping[str, Any]
"""prompt, subject (or None), target, id (or None)."""

MANY = 1_000_000
"""Keys from which an index library searches, where it is installed."""


def fact_of(request: EditRequest) -> dict[str, Any]:
    """A request as a book holds it."""
    names = ("prompt", "subject", "target", "id")
    return {name: getattr(request, name) for name in names}


def statement(fact: Fact) -> str:
    """A fact as the text that its prompt and its target make."""
    return said(fact["prompt"], fact["target"])


def said(prompt: str, answer: str) -> str:
    """A prompt and its answer as one text."""
    return f"{prompt}{separator(prompt, answer)}{answer}"


def are_facts(value: Any) -> bool:
    """Whether a value from a file is a list of facts, one at least."""
    text, maybe = (str,), (str, type(None))
    kinds: dict[str, Any] = {"prompt": text, "target": text, "subject": maybe, "id": maybe}
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(fact, dict) and set(fact) == set(kinds) for fact in value)
        and all(isinstance(fact[name], kind) for fact in value for name, kind in kinds.items())
    )


def newest(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests, those of the same prompt once: the last of them."""
    return list({request.prompt: request for request in requests}.values())


def readings(question: str) -> list[str]:
    """A question, and its last sentence where it has several."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", question.strip()) if part.strip()]
    return [question] if len(sentences) < 2 else [question, sentences[-1]]


def names(question: str, subject: str | None) -> bool:
    """Whether the question has the subject in it, as whole words, in whatever case."""
    if not subject:
        return False
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", question, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Least:
    """Cosines from which a question is about a fact: named, where it has the fact's subject in it;
    unnamed, where it does not."""

    named: float
    unnamed: float

    def of(self, fact: Fact, question: str) -> float:
        return self.named if names(question, fact["subject"]) else self.unnamed


@dataclass(frozen=True, eq=False)
class Factbook:
    """Facts with their keys.

    Attributes:
        facts: oldest first.
        keys_NE: vectors of length one; fact_N: which fact each is a key of.
        owner_F: which part of a joined book each fact came with.
    """

    facts: tuple[Fact, ...]
    keys_NE: Tensor
    fact_N: Tensor
    owner_F: tuple[int, ...]

    @classmethod
    def of(
        cls, requests: Sequence[EditRequest], encoder: Encoder, progress: Progress = silent
    ) -> Factbook:
        """A book of requests; of those with one prompt the newest."""
        kept = newest(requests)
        texts = [[r.prompt, *r.rephrases] for r in kept]
        fact_N = torch.tensor([n for n, some in enumerate(texts) for _ in some])
        keys_NE = encoder.encode([text for some in texts for text in some], progress)
        return cls(tuple(map(fact_of, kept)), keys_NE, fact_N, (0,) * len(kept))

    @classmethod
    def joined(cls, books: Sequence[Factbook]) -> Factbook:
        """Several books as one; of facts with one prompt the one of the last book stays."""
        last = {
            f["prompt"]: (n, i) for n, book in enumerate(books) for i, f in enumerate(book.facts)
        }
        places = list(last.values())
        number = {place: at for at, place in enumerate(places)}
        keys, owners = [], []
        for n, book in enumerate(books):
            stays = [number.get((n, int(i)), -1) for i in book.fact_N]
            kept = [at for at, fact in enumerate(stays) if fact >= 0]
            keys.append(book.keys_NE[kept])
            owners += [stays[at] for at in kept]
        facts = tuple(books[n].facts[i] for n, i in places)
        return cls(facts, torch.cat(keys), torch.tensor(owners), tuple(n for n, _ in places))

    def without(self, numbers: Sequence[int]) -> Factbook:
        """The book without the facts of these numbers."""
        left = [i for i in range(len(self.facts)) if i not in set(numbers)]
        number = {fact: at for at, fact in enumerate(left)}
        kept = [at for at, fact in enumerate(self.fact_N.tolist()) if fact in number]
        fact_N = torch.tensor([number[int(self.fact_N[at])] for at in kept])
        facts = tuple(self.facts[i] for i in left)
        return Factbook(facts, self.keys_NE[kept], fact_N, tuple(self.owner_F[i] for i in left))

    def nearest(self, question: str, encoder: Encoder, count: int) -> list[tuple[int, float]]:
        """The `count` facts nearest to a question, nearest first, with their cosines."""
        queries_QE = encoder.encode(readings(question))
        wanted = min(len(self.keys_NE), count * self._most)
        found: dict[int, float] = {}
        for scores, keys in zip(*best_keys(queries_QE, self.keys_NE, wanted), strict=True):
            for score, key in zip(scores.tolist(), keys.tolist(), strict=True):
                fact = int(self.fact_N[key])
                found[fact] = max(score, found.get(fact, -1.0))
        # Of equal ones the newer goes first.
        return sorted(found.items(), key=lambda one: (-one[1], -one[0]))[:count]

    @property
    def _most(self) -> int:
        """Keys of one fact at most."""
        return int(torch.bincount(self.fact_N).max())


def best_keys(queries_QE: Tensor, keys_NE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest keys of each query: cosines and numbers (Q, count), nearest first.

    Exact; beyond a million keys faiss (extra `index`) does the same search in less time.
    """
    if len(keys_NE) > MANY and importlib.util.find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatIP(keys_NE.shape[1])
        index.add(keys_NE.numpy())
        scores, numbers = index.search(queries_QE.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(numbers)
    # One query after the other: what one finds does not depend on the others.
    rows = [(keys_NE @ query_E).topk(count) for query_E in queries_QE]
    return torch.stack([row.values for row in rows]), torch.stack([row.indices for row in rows])


class Holds(Protocol):
    """What a patch may keep a book in: a prompt rule or a procedure."""

    @property
    def data(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


def kept(book: Factbook, encoder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A book as a patch keeps it: data and tensors."""
    data = {"facts": list(map(dict, book.facts)), "encoder": encoder}
    return data, {"keys": book.keys_NE, "fact.index": book.fact_N}


def book_of(part: Holds) -> Factbook:
    """The book that `kept` was given."""
    facts = tuple(part.data["facts"])
    return Factbook(facts, part.tensors["keys"], part.tensors["fact.index"], (0,) * len(facts))


def holds_book(part: Holds) -> bool:
    """Whether a part from a file has a whole book, and no other tensors."""
    data, tensors = part.data, part.tensors
    if set(tensors) != {"keys", "fact.index"} or not isinstance(data.get("encoder"), str):
        return False
    keys, facts = tensors["keys"], tensors["fact.index"]
    return (
        are_facts(data.get("facts"))
        and keys.ndim == 2
        and facts.ndim == 1
        and len(keys) == len(facts) > 0
        and keys.dtype == torch.float32
        and sorted(set(facts.tolist())) == list(range(len(data["facts"])))
    )


def parted(part: Holds, prompts: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Data and tensors of a part without the facts of these prompts."""
    book = book_of(part)
    left = book.without([n for n, fact in enumerate(book.facts) if fact["prompt"] in prompts])
    data, tensors = kept(left, part.data["encoder"])
    return {**part.data, **data}, {**part.tensors, **tensors}


def joined(parts: Sequence[Holds]) -> tuple[Factbook, str]:
    """The books of several patches as one, and the encoder that all were read by.

    Raises:
        PatchError: they were read by different ones.
    """
    encoders = {part.data["encoder"] for part in parts}
    if len(encoders) > 1:
        raise PatchError(
            "patches whose facts were read by different encoders cannot be in force together "
            f"({', '.join(sorted(encoders))}): make them anew with one"
        )
    return Factbook.joined([book_of(part) for part in parts]), encoders.pop()
