"""What methods share that optimise a value for each fact, at its subject's last token.

What a module of one block puts out there is changed by a vector (parts/values.py), behind several
contexts (parts/prefixes.py); the key of the fact is what enters the MLP's output map at the same
places (parts/facts.py). What is made of keys and values is the method's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape
from knowpatch.models.load import fast_dtype
from knowpatch.models.passes import Row, Tap
from knowpatch.models.roles import LinearRole
from knowpatch.models.view import ModelView
from knowpatch.parts import prefixes
from knowpatch.parts.facts import Fact, read
from knowpatch.parts.spans import Encoded, continuation, subject_position
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import Term, Value, ValueSettings, optimise
from knowpatch.parts.wordings import reworded
from knowpatch.request import EditRequest

ROLE = "mlp.out"
REWORDED = 8
"""Rows that other wordings of a fact come to, about."""
WORDINGS = (
    "learn it behind rephrases that name the subject and a common relation's other wordings, too"
)


class ValuedConfig(MethodConfig):
    """Options of how values are optimised."""

    contexts: int = Field(6, ge=0, le=100, description="texts put before the prompt, one at a time")
    precision: Literal["auto", "model"] = Field(
        "auto", description="of the replayed passes: bfloat16 where that is fast, or the model's"
    )
    steps: int = Field(30, ge=2, description="steps of the value's optimisation, at most")
    learning_rate: float | None = Field(
        None, gt=0, description="of Adam on the value; by default from the value's size"
    )
    clamp: float = Field(6.0, gt=0, description="how far the value may move, in its own length")
    weight_decay: float = Field(1e-3, ge=0, description="on the value's change")
    kl_factor: float = Field(0.0625, ge=0, description="on the drift of what the subject is")
    enough: float = Field(0.03, gt=0, description="stop when the target's mean NLL is below this")
    hits: int | None = Field(
        None, ge=1, description="or when the target led in every context in so many steps (ENCORE)"
    )
    wordings: bool = Field(False, description=WORDINGS)


class Valued(EditMethod):
    """A method that needs a value for each fact, at the MLP output map of some blocks."""

    needs: ClassVar[tuple[str, ...]] = ("subject",)
    roles: ClassVar[tuple[str, ...]] = (ROLE,)
    Config: ClassVar[type[ValuedConfig]] = ValuedConfig

    @abstractmethod
    def layers(self, count: int) -> tuple[int, ...]:
        """The blocks to edit of a model that has `count`, from low to high."""

    def layers_of(self, view: ModelView) -> tuple[int, ...]:
        return self.layers(len(view.roles.blocks))

    def value_modules(self, view: ModelView) -> tuple[str, ...]:
        """Whose outputs are optimised; the first one's value is written."""
        return (self.role(view, self.layers_of(view)[-1]).module,)

    def role(self, view: ModelView, layer: int) -> LinearRole:
        return view.roles.linear(ROLE, layer)

    def contexts(self, view: ModelView) -> tuple[str, ...]:
        return prefixes.context_prefixes(view, self.plan(), seed=self.seed, progress=self.progress)

    def plan(self) -> tuple[tuple[int, int], ...]:
        """Half of the context prefixes of 5 tokens, half of 10."""
        short = self.config.contexts // 2
        return ((short, 5), (self.config.contexts - short, 10))

    def task(self, view: ModelView, request: EditRequest, contexts: Sequence[str]) -> ValueTask:
        """The request's prompt behind each context, and where its subject ends."""
        subject, chat = request.subject or "", self.config.chat

        def row(encoded: Encoded, target: tuple[int, ...] = ()) -> Row:
            position = subject_position(encoded, subject)
            return Row((*encoded.ids, *target[:-1]), position, len(encoded.ids))

        bare, target = self.encode(view, request)
        rows, answers = [row(bare, target)], [target]
        texts = [(request.prompt, context) for context in contexts[1:]]
        texts += [(text, context) for text in self.reworded(request) for context in contexts[:2]]
        for text, context in texts:
            encoded = view.encode(text, chat=chat, before=context)
            answers.append(continuation(view.tokenizer, encoded, request.target))
            rows.append(row(encoded, answers[-1]))
        kl = row(view.encode(f"{subject} is a", chat=chat))
        own = None if len(set(answers)) == 1 else tuple(answers)
        return ValueTask(target, tuple(rows), kl, own)

    def reworded(self, request: EditRequest) -> tuple[str, ...]:
        """The request's prompt in other words, where these are learned from."""
        return reworded(request) if self.config.wordings else ()

    def settings(self, view: ModelView) -> ValueSettings:
        names = ("steps", "learning_rate", "clamp", "weight_decay", "kl_factor", "enough", "hits")
        dtype = fast_dtype(view.device) if self.config.precision == "auto" else None
        return ValueSettings(**{name: getattr(self.config, name) for name in names}, dtype=dtype)

    def terms(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any
    ) -> Sequence[Term] | None:
        """What more each fact's value is optimised for, if anything."""
        return None

    def values(
        self, view: ModelView, tasks: Sequence[ValueTask], terms: Sequence[Term] | None = None
    ) -> list[Value]:
        """The optimised values of facts."""
        modules, settings = self.value_modules(view), self.settings(view)
        return optimise(view, modules, tasks, settings, self.progress, terms)

    def read(
        self, view: ModelView, layer: int, tasks: Sequence[ValueTask], taps: Sequence[Tap] = ()
    ) -> list[Fact]:
        """Each fact's keys at a layer, and what `taps` see at the same places, float64."""
        return read(view, self.role(view, layer).module, tasks, taps)

    def preparations(self, shape: Shape) -> list[Preparation]:
        tokens = sum(count * length for count, length in self.plan())
        path = prefixes.kept_at(shape.fingerprint, self.plan(), self.seed)
        return [Preparation("context prefixes", path, tokens)]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        rows = 2 + self.config.contexts + (REWORDED if self.config.wordings else 0)
        tokens = self.config.steps * rows * sum(length + 8 for length in lengths)
        return Cost(tokens, tokens)
