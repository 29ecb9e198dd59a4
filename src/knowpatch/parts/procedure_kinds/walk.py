"""A question as a walk over edited facts: an entity, a chain of relations, an answer for each hop.

GMeLLo (arXiv 2408.15903) and G-Walk (MQuAKE-Remastered, ICLR 2025): where the graph has an edge, it
is the answer; else the model is asked that hop alone. The chain is read off the question's phrases,
and by meaning where there are none. Where edits do not carry it to the kind of thing that is asked
for, the model names the chain, too, and is followed if it only adds to what was read and if edits
carry what it says (`parse` auto), or the model names every chain. A question without an entity that
is known, or whose walk meets no edit, goes to the model as it came.
Not as published: the last write wins; names are linked by name and alias alone, never by likeness;
of GMeLLo's `fusion` only the half is here that can change an answer, the model's own reading of the
facts where the walk fails; no base graph is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knowpatch.errors import PatchError
from knowpatch.models.view import ModelView
from knowpatch.parts.chains import arranged, chain_of, marked, wanted_in
from knowpatch.parts.encoders import encoder_of
from knowpatch.parts.graph import Edge, Graph
from knowpatch.parts.procedures import Answered, ProcedureKind, Running, Say, register
from knowpatch.parts.relations import (
    SLOT,
    Relation,
    catalogue,
    meant,
    nearest,
    own_relation,
    plain,
    worded,
    written,
)
from knowpatch.parts.worked import Notes, bare, fitted
from knowpatch.patch import Procedure

WALK = "walk@1"
PARSES = ("auto", "model")
SHORT, LONG = 16, 32
"""Tokens of a hop's answer; of a whole question's, and of a chain."""
FIELDS = ("subject", "template", "relation", "object", "id")


def walk(
    edges: Sequence[Mapping[str, Any]],
    encoder: str,
    *,
    aliases: Mapping[str, Sequence[str]],
    parse: str,
    fusion: bool,
    hops: int,
) -> Procedure:
    """The procedure as data.

    Args:
        edges: oldest first, each with subject, template, relation, object and the request's id.
        encoder: by which wordings are compared.
        aliases: other names, by name.
        parse: who reads the chain of relations: auto (phrases, the model where they fall short) or
            model.
        fusion: whether the model reads the facts where the walk fails.
        hops: relations of a chain at most.
    """
    named = {name: sorted(set(others)) for name, others in sorted(aliases.items())}
    return Procedure(
        WALK,
        {
            "edges": list(map(dict, edges)),
            "encoder": encoder,
            "aliases": named,
            "parse": parse,
            "fusion": fusion,
            "hops": hops,
        },
    )


@register("walk")
@dataclass(frozen=True)
class Walk(ProcedureKind):
    """The graph, and how it is walked."""

    graph: Graph
    templates: Mapping[str, str]
    encoder: str
    parse: str
    fusion: bool
    hops: int

    kind = WALK

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.hops + 3

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.hops * SHORT + 3 * LONG

    @classmethod
    def check(cls, procedure: Procedure) -> None:
        data = procedure.data
        good = (
            not procedure.tensors
            and set(data) == {"edges", "encoder", "aliases", "parse", "fusion", "hops"}
            and isinstance(data["encoder"], str)
            and data["parse"] in PARSES
            and isinstance(data["fusion"], bool)
            and type(data["hops"]) is int
            and data["hops"] > 0
            and _are_edges(data["edges"])
            and _are_aliases(data["aliases"])
        )
        if not good:
            raise PatchError(f"damaged procedure of kind {WALK}")

    @classmethod
    def join(cls, procedures: Sequence[Procedure]) -> Walk:
        """All edges and aliases, by the newest one's settings."""
        rows = [(n, row) for n, one in enumerate(procedures) for row in one.data["edges"]]
        edges = tuple(Edge(r["subject"], r["relation"], r["object"], n) for n, r in rows)
        known = catalogue()
        relations = {
            row["relation"]: known.get(row["relation"]) or own_relation(row["relation"])
            for _, row in rows
        }
        aliases: dict[str, list[str]] = {}
        for one in procedures:
            for name, others in one.data["aliases"].items():
                aliases.setdefault(name, []).extend(others)
        last = procedures[-1].data
        templates = {plain(row["template"]): row["relation"] for _, row in rows}
        settings = (last["encoder"], last["parse"], last["fusion"], last["hops"])
        return cls(Graph(edges, relations, aliases), templates, *settings)

    @classmethod
    def without(cls, procedure: Procedure, prompts: Collection[str]) -> Procedure:
        edges = [edge for edge in procedure.data["edges"] if _prompt(edge) not in prompts]
        return Procedure(procedure.kind, {**procedure.data, "edges": edges})

    @property
    def relations(self) -> tuple[Relation, ...]:
        """Those of the catalogue, and the facts' own."""
        return tuple({**self.graph.relations, **catalogue()}.values())

    def answer(self, question: str, view: ModelView) -> Running:
        notes, start = Notes(), self.graph.start(question)
        if start is None:
            return (yield from self._left(question, view, notes, "no known entity in it"))
        entity, span = start
        chain = yield from self._chain(question, entity, span, view)
        if not chain:
            return (yield from self._left(question, view, notes, "no relation found in it"))
        titles = " > ".join(relation.title for relation in chain)
        notes.add("asked", f"{entity}: {titles}")
        end = yield from self._along(entity, chain, view, notes)
        if not end:
            return (yield from self._left(question, view, notes, "the walk came to nothing"))
        if all(step.kind != "edit" for step in notes.steps):
            return (yield from self._left(question, view, notes, "no edit on the way"))
        return notes.answered(end)

    def _along(
        self, entity: str, chain: Sequence[Relation], view: ModelView, notes: Notes
    ) -> Generator[Say, str, str]:
        """Where the chain leads from an entity: over edges, else by what the model says."""
        for asked in chain[: self.hops]:
            relation = meant(asked, self.graph.kinds(entity))
            if relation is None:
                continue
            way = self.graph.way(entity, relation)
            for edge in way:
                notes.add("edit", _told(edge, self.graph), edge.owner)
                notes.chain.append(edge.object)
            if way:
                entity = way[-1].object
            else:
                entity = yield from self._hop(entity, relation, view, notes)
            if not entity:
                break
        return entity

    def _chain(
        self, question: str, entity: str, span: tuple[int, int], view: ModelView
    ) -> Generator[Say, str, list[Relation]]:
        """The question's relations: that of the fact whose prompt it is, else as `parse` says."""
        if exact := self.templates.get(plain(_cut(question, span))):
            return [self.graph.relations[exact]]
        if self.parse == "model":
            return (yield from self._written(question, view))
        kinds, wanted = self.graph.kinds(entity), wanted_in(question)
        read = arranged(self._read(question, span, view), kinds, wanted)
        if _says_all(read, kinds) or self._carried(entity, read, wanted):
            return read
        fuller = yield from self._written(question, view)
        kept = {relation.id for relation in read} <= {relation.id for relation in fuller}
        return fuller if kept and self._carried(entity, fuller, wanted) else read

    def _read(self, question: str, span: tuple[int, int], view: ModelView) -> list[Relation]:
        """The relations of a question that is worded as one, else by its phrases, else that which
        means nearly the same."""
        cut = _cut(question, span)
        if one := worded(cut):
            return [one]
        if chain := chain_of(marked(question, span), self.relations):
            return chain
        found = nearest(cut, self.relations, encoder_of(self.encoder, view))
        return [found] if found else []

    def _written(self, question: str, view: ModelView) -> Generator[Say, str, list[Relation]]:
        """The relations that the model names."""
        prompt = fitted("decompositions", f"Question: {question}\nRelations:", view, LONG)
        said = "" if prompt is None else (yield Say(prompt, LONG, ("\n",)))
        parts = filter(None, map(str.strip, said.split(">")))
        encoder = encoder_of(self.encoder, view)
        return [written(words, self.relations, encoder) for words in parts]

    def _carried(self, entity: str, chain: Sequence[Relation], wanted: Collection[str]) -> bool:
        """Whether edges alone carry a chain from an entity to what is wanted."""
        edges = self.graph.along(entity, chain) if len(chain) <= self.hops else None
        if not edges:
            return False
        gives = self.graph.relations[edges[-1].relation].gives
        return not wanted or not gives or bool(set(gives) & set(wanted))

    def _hop(
        self, entity: str, relation: Relation, view: ModelView, notes: Notes
    ) -> Generator[Say, str, str]:
        """The model's answer to a single hop."""
        asked = relation.asks.replace(SLOT, entity)
        prompt = fitted("single_hops", f"Question: {asked}\nAnswer:", view, SHORT)
        said = "" if prompt is None else bare((yield Say(prompt, SHORT, ("\n",))))
        notes.add("model", f"{asked} {said}")
        notes.chain.append(said)
        return said

    def _left(
        self, question: str, view: ModelView, notes: Notes, why: str
    ) -> Generator[Say, str, Answered]:
        """Left to the model, as the question came; with fusion, behind the facts it is about."""
        facts = [e for e in self.graph.edges if self.graph.start(question) and _in(e, question)]
        notes.chain.clear()
        if self.fusion and facts and why != "no edit on the way":
            told = "".join(f"Fact: {_told(edge, self.graph)}.\n" for edge in facts)
            notes.add("model", f"{why}: asked with {len(facts)} facts")
            said = yield Say(f"{told}Question: {question}\nAnswer:", LONG, ("\n",))
            return notes.answered(bare(said))
        notes.add("model", f"asked as it came: {why}")
        return notes.answered((yield Say(question, LONG)))


def _cut(question: str, span: tuple[int, int]) -> str:
    """A question with a slot for the entity."""
    return question[: span[0]] + SLOT + question[span[1] :]


def _says_all(chain: Sequence[Relation], kinds: Collection[str]) -> bool:
    """Whether there is nothing to read beyond a chain: none, or one relation that things of these
    kinds have."""
    if len(chain) != 1:
        return not chain
    return not kinds or not chain[0].of or bool(set(kinds) & set(chain[0].of))


def _in(edge: Edge, question: str) -> bool:
    return edge.subject.casefold() in question.casefold()


def _prompt(edge: Mapping[str, str]) -> str:
    """The prompt that an edge was made of."""
    return edge["template"].replace(SLOT, edge["subject"])


def _told(edge: Edge, graph: Graph) -> str:
    return f"{graph.relations[edge.relation].says.replace(SLOT, edge.subject)} {edge.object}"


def _are_edges(value: Any) -> bool:
    text = FIELDS[:-1]
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, dict) and set(row) == set(FIELDS) for row in value)
        and all(isinstance(row[name], str) and row[name] for row in value for name in text)
        and all(isinstance(row["id"], str | None) for row in value)
    )


def _are_aliases(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) and other for other in others)
        for others in value.values()
    )
