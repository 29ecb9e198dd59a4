"""Graph walk: edits as edges of a graph that multi-hop questions are walked over.

GMeLLo (Chen et al., arXiv 2408.15903) and G-Walk (MQuAKE-Remastered, ICLR 2025); the walk is in
parts/procedure_kinds/walk.py. An edit is an edge: its subject, the relation that its prompt states
with the subject cut out (parts/relations.py), its target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from knowpatch.method import Cost, EditMethod, MethodConfig, Shape, register
from knowpatch.models.view import ModelView
from knowpatch.parts.encoders import AUTO, Encoder, chosen, encoder_of
from knowpatch.parts.procedure_kinds.walk import walk
from knowpatch.parts.relations import relation_of, template_of
from knowpatch.patch import Patch
from knowpatch.request import EditRequest


class GraphWalkConfig(MethodConfig):
    """Options of the graph walk."""

    encoder: str = Field(
        AUTO,
        description="by which wordings are compared: auto, all-MiniLM-L6-v2, own (the model's "
        "states), a folder, or a sentence-transformers model",
    )
    parse: Literal["auto", "model"] = Field(
        "auto",
        description="who reads the chain of relations in a question: its phrases, and the model "
        "where edits do not carry what they say (auto), or the model alone",
    )
    fusion: bool = Field(
        False, description="where the walk fails, the model answers behind the facts (GMeLLo)"
    )
    hops: int = Field(5, ge=1, description="relations of a chain at most")
    aliases: Mapping[str, tuple[str, ...]] = Field(
        {}, description="other names of entities, by name"
    )


@register("graph_walk")
class GraphWalk(EditMethod):
    """Edits as edges."""

    name = "graph_walk"
    family = "external"
    paper = "Chen et al. 2024, arXiv 2408.15903; MQuAKE-Remastered, ICLR 2025"
    summary = "edits are a graph; a question is walked over it, the model asked where no edge is"
    choose = "questions that need a chain of edited facts, whatever the model"
    needs = ("subject",)
    Config = GraphWalkConfig

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        config, name = self.config, chosen(self.config.encoder)
        edges = [self._edge(request, encoder_of(name, view)) for request in requests]
        aliases = {one: list(others) for one, others in config.aliases.items()}
        settings = {"parse": config.parse, "fusion": config.fusion, "hops": config.hops}
        procedure = walk(edges, name, aliases=aliases, **settings)
        return self.patch(view, requests, procedure=procedure)

    @staticmethod
    def _edge(request: EditRequest, encoder: Encoder) -> dict[str, str | None]:
        """The request as an edge."""
        template = template_of(request)
        assert template is not None, "a subject is needed"
        return {
            "subject": request.subject,
            "template": template,
            "relation": relation_of(template, encoder).id,
            "object": request.target,
            "id": request.id,
        }

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        return Cost(forward_tokens=0)
