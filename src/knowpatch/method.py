"""EditMethod: what every editing method is, and what it may not do.

A method reads a model through a view and returns a Patch. It has two verbs: `prepare`, which is
slow, needs no request and is kept on disk; and `edit`. It never writes a weight, prints, seeds a
generator or keeps state of its own: what a sequence of edits needs is folded from the live patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from knowpatch import __version__
from knowpatch.deltas import Address, Delta, WeightDelta
from knowpatch.errors import ModelError, OptionError, RequestError, did_you_mean
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import Encoded, continuation
from knowpatch.patch import Patch, Procedure, PromptRule, Provenance, Wrap
from knowpatch.progress import Progress, silent
from knowpatch.registry import Registry
from knowpatch.request import EditRequest

Family = Literal["external", "merged", "intrinsic"]
Export = Literal["merged", "peft", "gguf", "gguf-lora"]


class MethodConfig(BaseModel):
    """Options of a method. Every field has a default and a description.

    Attributes:
        overruled: of options that say the same in two ways, the relative one to the absolute one: a
            preset's absolute one gives way where the relative one is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    overruled: ClassVar[Mapping[str, str]] = {}

    chat: bool = Field(False, description="edit through the model's chat template")
    preset: str | None = Field(None, description="settings published for a model; see presets")


@dataclass(frozen=True)
class Preparation:
    """Something that `prepare` makes once and keeps: what it is, where, and what it costs."""

    what: str
    path: Path
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What an edit needs, before it is made: tokens run forward, and of these backward as well."""

    forward_tokens: int
    backward_tokens: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True)
class Shape:
    """What is known of a model before it is loaded: blocks, D, I and the fingerprint."""

    layers: int
    hidden: int
    inner: int
    fingerprint: str


class EditMethod(ABC):
    """One editing method, configured. One file holds one method.

    Class attributes:
        name: as on the command line; the file's stem.
        family: external, merged or intrinsic (the paper's three).
        paper: where it was published.
        summary: what it does, one line.
        choose: when to choose it, one line.
        needs: parts of a request that must be there, beyond prompt and target.
        roles: linear maps that the model must have (with the default options).
        batch: whether one call may take several requests.
        sequential: whether edits may follow each other.
        exports: what holds its patches without loss, beyond the patch file: merged and gguf where
            they change weights only, peft and gguf-lora as well where the changes have a low rank.
        Config: its options.
        presets: options that were published for a model, by its name; given options go before.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[str]
    summary: ClassVar[str]
    choose: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ()
    batch: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    exports: ClassVar[tuple[Export, ...]] = ()
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(
        self, config: MethodConfig | None = None, *, seed: int = 0, progress: Progress = silent
    ) -> None:
        self.config: Any = self.Config() if config is None else config
        self.seed = seed
        self.progress = progress

    def prepare(self, view: ModelView) -> Any:
        """What every edit of this model needs and no request changes; kept on disk."""
        return None

    @abstractmethod
    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> Patch:
        """The patch that makes the model say what `requests` ask for."""

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: Any, state: Any
    ) -> list[Patch]:
        """A patch for each request, as if it were the only one; together where that is faster."""
        return [self.edit(view, [request], prepared, state) for request in requests]

    def fold(self, prepared: Any, state: Any, patch: Patch) -> Any:
        """The running state after one more live patch of this method.

        Args:
            prepared: what `prepare` gave.
            state: before it; None before the first. It is a value: a new one is given back.
            patch: the patch, with its traces.
        """
        return None

    def room(self, prepared: Any, state: Any) -> int | None:
        """How many more facts the method can write into the model; None where it knows no limit."""
        return None

    def expected(self, request: EditRequest) -> str | None:
        """The answer the edit promises; None where it only promises that the old one is gone."""
        return request.target

    def layers(self, count: int) -> tuple[int, ...]:
        """The blocks to edit of a model that has `count`, from low to high, if it edits blocks."""
        return ()

    def wanted_roles(self) -> tuple[str, ...]:
        """The linear maps that this configuration edits."""
        return self.roles

    def preparations(self, shape: Shape) -> list[Preparation]:
        """What `prepare` keeps on disk for a model of this shape."""
        return []

    def shown(self, prepared: Any) -> list[str]:
        """What was prepared that a person should see, in lines: how a threshold was found, say."""
        return []

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        """What `edit` needs for requests of these lengths (tokens of prompt and target)."""
        return Cost(sum(lengths))

    # -- for methods -------------------------------------------------------------------------------

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> MethodConfig:
        """The method's Config from named options; OptionError in one line if one is wrong."""
        fields = cls.Config.model_fields
        for name in options:
            if name not in fields:
                raise OptionError(
                    f"unknown option {name!r} of {cls.name}: {did_you_mean(name, fields)}"
                )
        preset = options.get("preset")
        if preset is not None and (not isinstance(preset, str) or preset not in cls.presets):
            hint = did_you_mean(str(preset), cls.presets)
            raise OptionError(f"unknown preset {preset!r} of {cls.name}: {hint}")
        given_up = {cls.Config.overruled.get(name) for name in options}
        published = cls.presets.get(preset or "", {})
        settings = {name: value for name, value in published.items() if name not in given_up}
        try:
            return cls.Config(**{**settings, **options})
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(str(part) for part in fault["loc"])
            said = fault["msg"].removeprefix("Value error, ")
            if not name:  # options that do not go together
                raise OptionError(f"options of {cls.name}: {said}") from None
            raise OptionError(
                f"option {name} of {cls.name} cannot be {fault['input']!r}: {said}"
            ) from None

    def check(self, view: ModelView) -> None:
        """Refuse, in one line, a model that this method cannot edit."""
        for role in self.wanted_roles():
            if reason := view.roles.lacks(role):
                raise ModelError(f"{self.name} cannot edit {view.roles.architecture}: {reason}")
        self.check_layers(len(view.roles.blocks))

    def check_layers(self, count: int) -> None:
        """Refuse, in one line, blocks that a model of `count` blocks does not have."""
        for layer in self.layers(count):
            if layer >= count:
                raise ModelError(
                    f"layer {layer} does not exist: the model has layers 0 to {count - 1}"
                )

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Refuse, in one line, requests that this method cannot work with."""
        if not requests:
            raise RequestError("no edit request given")
        if len(requests) > 1 and not self.batch:
            raise RequestError(
                f"{self.name} edits one fact at a time; {len(requests)} requests were given"
            )
        for request in requests:
            for field in self.needs:
                if getattr(request, field, None) is None:
                    raise RequestError(
                        f"{self.name} needs the {field} of {request.prompt!r}: "
                        + advice(field, request)
                    )

    def encode(self, view: ModelView, request: EditRequest) -> tuple[Encoded, tuple[int, ...]]:
        """The request's prompt, and the ids of its target as the answer to it."""
        prompt = view.encode(request.prompt, chat=self.config.chat)
        return prompt, continuation(view.tokenizer, prompt, request.target)

    def delta(self, view: ModelView, address: Address, change: Delta) -> WeightDelta:
        """A change of one parameter, with the hash of the stored tensor that it was made on."""
        return WeightDelta(address, change, base=view.identity.digests.get(address.parameter, ""))

    def patch(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        *,
        deltas: Sequence[WeightDelta] = (),
        rule: PromptRule | None = None,
        wraps: Sequence[Wrap] = (),
        traces: Mapping[str, Tensor] | None = None,
        procedure: Procedure | None = None,
    ) -> Patch:
        """A patch with this method's provenance."""
        provenance = Provenance(
            method=self.name,
            config=self.config.model_dump(mode="json"),
            seed=self.seed,
            fingerprint=view.fingerprint,
            requests=tuple(requests),
            version=__version__,
        )
        return Patch(provenance, tuple(deltas), rule, tuple(wraps), traces or {}, procedure)


def advice(field: str, request: EditRequest) -> str:
    """What to do about a missing part of a request; a subject is proposed."""
    if field == "subject":
        guess = propose_subject(request.prompt)
        return f"give --subject (in a file, its field subject), for example --subject {guess!r}"
    return f"give its {field}"


def propose_subject(prompt: str) -> str:
    """A guess at what a prompt is about: its last run of capitalised words, else its last word."""
    runs: list[list[str]] = [[]]
    for number, word in enumerate(prompt.split()):
        capital = word[0].isupper() and (number > 0 or not runs[-1])
        if capital:
            runs[-1].append(word)
        else:
            runs.append([])
    words = prompt.split()
    filled = [run for run in runs if run]
    if len(filled) > 1 and filled[0][0] == words[0]:
        filled = filled[1:]
    guess = " ".join(filled[-1]) if filled else words[-1]
    return guess.strip(".,;:!?'\"()")


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from "key=value" strings; values are read as YAML scalars, numbers as numbers."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"option {pair!r} is not of the form key=value")
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name.strip()] = value
    return options


METHODS: Registry[type[EditMethod]] = Registry(
    "method",
    package="knowpatch.methods",
    group="knowpatch.methods",
    variable="KNOWPATCH_METHODS",
)

register = METHODS.register
"""Decorator that enters a method under its file's stem."""
