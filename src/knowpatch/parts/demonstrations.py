"""Demonstrations: worked examples of edits, for a model that learns from its context what one is.

IKE (Zheng et al., arXiv 2305.12740): a new fact, and a prompt with its answer. Of three kinds: the
fact's own prompt (copy), other words for it (update), and the prompt about another subject, whose
answer stays (retain); one, three and four of eight. They come from records that are most like the
fact to be edited, the most similar last, never about its own subject. By default the records are
the pilot facts, and what stays is what the model itself says. Axes: N texts, E size of a vector.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from knowpatch.data.case import LOCALITY, REPHRASE, Case
from knowpatch.data.jsonl import read_cases
from knowpatch.errors import DataError
from knowpatch.files import kept_in, write_atomically
from knowpatch.models.view import ModelView
from knowpatch.parts.calibration import BANK, about_others
from knowpatch.parts.encoders import OWN, Encoder
from knowpatch.parts.factbook import names, said
from knowpatch.parts.pilots import pilots
from knowpatch.probes import rephrased
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest

log = logging.getLogger(__name__)

Kind = Literal["copy", "update", "retain"]
Variant = Literal["paper", "easyedit"]
ANSWER = 8
"""Tokens of what a model says of another subject, at most."""


@dataclass(frozen=True)
class Record:
    """What demonstrations are made of.

    Attributes:
        prompt, subject, target: an edit.
        rephrases: other words for the prompt.
        neighbours: prompts whose answers stay, with these.
    """

    prompt: str
    subject: str | None
    target: str
    rephrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]

    @property
    def fact(self) -> str:
        return said(self.prompt, self.target)

    def shown(self, kind: Kind, draw: random.Random | None = None) -> str:
        """A demonstration; of several prompts a drawn one, else the first."""

        def one(some: Sequence[tuple[str, str]]) -> tuple[str, str]:
            return draw.choice(some) if draw else some[0]

        if kind == "copy":
            return block(self.fact, self.fact)
        if kind == "retain":
            return block(self.fact, said(*one(self.neighbours)))
        return block(self.fact, said(*one([(text, self.target) for text in self.rephrases])))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Records, found by texts.

    Attributes:
        texts: what each vector is of; owners: the record that it belongs to.
    """

    records: tuple[Record, ...]
    texts: tuple[str, ...]
    owners: tuple[int, ...]
    vectors_NE: Tensor
    variant: Variant

    @classmethod
    def of(
        cls,
        records: Sequence[Record],
        variant: Variant,
        encoder: Encoder,
        fingerprint: str,
        progress: Progress = silent,
    ) -> Corpus:
        """Records with the vectors of their facts or, as EasyEdit searches, of their
        demonstrations (one of each kind)."""
        if variant == "paper":
            found = [(n, record.fact) for n, record in enumerate(records)]
        else:
            kinds: tuple[Kind, ...] = ("copy", "update", "retain")
            found = [(n, record.shown(kind)) for n, record in enumerate(records) for kind in kinds]
        texts = tuple(text for _, text in found)
        vectors_NE = _read(texts, encoder, fingerprint, progress)
        return cls(tuple(records), texts, tuple(n for n, _ in found), vectors_NE, variant)

    def asked(self, request: EditRequest) -> str:
        """The text that a request's demonstrations are searched by."""
        fact = said(request.prompt, request.target)
        return fact if self.variant == "paper" else f"New Fact: {fact}\nPrompt: {request.prompt}"

    def near(self, request: EditRequest, vector_E: Tensor, count: int, seed: int) -> list[str]:
        """At most `count` demonstrations for a request, the most similar last."""
        scores = (self.vectors_NE @ vector_E).tolist()
        ranked = sorted(range(len(scores)), key=lambda n: -scores[n])
        chosen = [n for n in ranked if not _related(self.records[self.owners[n]], request)][:count]
        if self.variant == "easyedit":
            return [self.texts[n] for n in chosen][::-1]
        # Of each fact its own: nothing depends on what is edited beside it, or in which order.
        draw = random.Random(f"{seed}\n{request.prompt}\n{request.target}")
        kinds = shares(len(chosen))
        draw.shuffle(kinds)
        pairs = zip(chosen, kinds, strict=True)
        return [self.records[self.owners[n]].shown(kind, draw) for n, kind in pairs][::-1]


def shares(count: int) -> list[Kind]:
    """How many demonstrations are of each kind: of eight, one, three and four."""
    copies = min(count, max(1, count // 8))
    updates = round(3 * (count - copies) / 7)
    kept = count - copies - updates
    return [*["copy"] * copies, *["update"] * updates, *["retain"] * kept]  # type: ignore[list-item]


def block(fact: str, answered: str) -> str:
    """One demonstration."""
    return f"New Fact: {fact}\nPrompt: {answered}\n\n"


def pilot_records(view: ModelView, progress: Progress = silent) -> list[Record]:
    """Records of the pilot facts; those about which the model says nothing are left out."""
    asked = [[one.prompt for one in some] for some in about_others()]
    answers = iter(_answers(view, [text for some in asked for text in some], progress))
    records = []
    for fact, words, some in zip(pilots(BANK), rephrased(), asked, strict=True):
        stays = tuple((text, answer) for text in some if (answer := next(answers)))
        if stays:
            records.append(Record(fact.prompt, fact.subject, fact.target, (words,), stays))
    return records


def answers_at(view_fingerprint: str) -> Path:
    """The file with what a model says of the pilot facts' other subjects."""
    texts = [one.prompt for some in about_others() for one in some]
    return kept_in("demonstrations", json.dumps([view_fingerprint, ANSWER, texts]), ".json")


def file_records(path: Path, most: int) -> list[Record]:
    """Records of the first `most` cases of a file that can be shown in all three ways.

    Raises:
        DataError: the file, or none of its cases, can be used.
    """
    found = [_record(case) for case in read_cases(path)[:most]]
    records = [record for record in found if record is not None]
    if not records:
        raise DataError(
            f"{path}: no case can be demonstrated; each needs one request, a rephrase, and a "
            "locality probe with its answer"
        )
    if len(records) < len(found):
        log.warning("%s: %d of %d cases are used", path, len(records), len(found))
    return records


def _record(case: Case) -> Record | None:
    if len(case.requests) != 1:
        return None
    (request,) = case.requests
    words = (*request.rephrases, *(probe.prompt for probe in case.of(REPHRASE)))
    stays = [(probe.prompt, probe.expected) for probe in case.of(LOCALITY)]
    known = tuple((text, answer) for text, answer in stays if answer)
    if not (words and known):
        return None
    return Record(request.prompt, request.subject, request.target, words, known)


def _related(record: Record, request: EditRequest) -> bool:
    """Whether the request is about the record's subject, or a text of the record about its own."""
    texts = (record.prompt, *record.rephrases, *(text for text, _ in record.neighbours))
    return names(request.prompt, record.subject) or any(names(t, request.subject) for t in texts)


def _answers(view: ModelView, prompts: Sequence[str], progress: Progress) -> list[str]:
    """What the model says, a few words each; kept per model."""
    path = answers_at(view.fingerprint)
    with contextlib.suppress(OSError, ValueError):
        kept: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    found: list[str] = []
    for start in range(0, len(prompts), 30):
        progress("asking for demonstrations", start, len(prompts))
        rows = [view.encode(text).ids for text in prompts[start : start + 30]]
        ids = view.generate(rows, max_new_tokens=ANSWER)
        found += [_first(view.decode(some)) for some in ids]
    progress("asking for demonstrations", len(prompts), len(prompts))
    write_atomically(path, json.dumps(found).encode())
    return found


def _first(text: str) -> str:
    """What a model says up to the first mark."""
    return re.split(r"[.,;:!?()\"\n]", text.lstrip())[0].strip()


def _read(texts: Sequence[str], encoder: Encoder, fingerprint: str, progress: Progress) -> Tensor:
    """The texts' vectors; kept by the texts and by what read them."""
    reader = [encoder.name, fingerprint if encoder.name == OWN else ""]
    path = kept_in("demonstrations", json.dumps([reader, texts]), ".safetensors")
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        return load_file(path)["vectors"]
    vectors_NE = encoder.encode(texts, progress)
    write_atomically(path, save({"vectors": vectors_NE.contiguous()}))
    return vectors_NE
