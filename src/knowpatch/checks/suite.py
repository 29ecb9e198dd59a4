"""Suite: what must hold of a model once it is edited, as a person writes it down in YAML.

    change:                              # what must change: a question, and the wanted answer
      - prompt: The capital of Australia is
        answer: Canberra
    keep:                                # what must not: as the unedited model answers, or as given
      - The capital of New Zealand is
      - prompt: The capital of France is
        answer: Paris
    thresholds: {change: 1.0, keep: 0.95}
    perplexity: {rise: 0.05}             # of ordinary text: at most 5 % more
    multiple_choice: {fall: 0.02}        # of the questions at most 2 % fewer answered right

docs/checks.md says what each line means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from knowpatch.data.case import Probe
from knowpatch.data.general import MOST, load_general
from knowpatch.errors import OptionError, did_you_mean
from knowpatch.files import write_atomically
from knowpatch.reading import decode, read_bytes

QUOTE = "put it into quotes"
HEADER = "# What must hold of the edited model: knowpatch check FILE; docs/checks.md explains it.\n"


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not text (half of a surrogate pair)") from None
    return text.strip()


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class _Int(int):
    """A number of a YAML file, with how it stands there."""

    written = ""


class _Float(float):
    """A number of a YAML file, with how it stands there."""

    written = ""


def _as_written(value: Any) -> Any:
    """A text that YAML takes for a number as it stands in the file: 010, not 8; 12:30, not 750."""
    return value.written if isinstance(value, _Int | _Float) else value


Text = Annotated[str, BeforeValidator(_as_written), AfterValidator(_filled)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_several)]
Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a suite: unknown fields are refused, numbers are answers, too."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class Keep(Part):
    """A question whose answer must stay: as it was, or one of those that are given.

    Attributes:
        prompt: the question, or the beginning of a text.
        answer: accepted answers; without one, what the unedited model says in a few tokens.
        chat: whether it is asked through the chat template.
    """

    prompt: Text
    answer: Texts = ()
    chat: bool = False


class Change(Keep):
    """A question whose answer must be one of those that are given, or must be gone.

    Attributes:
        gone: what must not be said any more.
    """

    gone: Texts = ()

    @model_validator(mode="after")
    def _wants(self) -> Change:
        if not self.answer and not self.gone:
            raise ValueError("wants nothing; give its answer, or what must be gone")
        if both := set(self.answer) & set(self.gone):
            raise ValueError(f"{min(both)!r} is wanted and must be gone; strike out one of the two")
        return self


class Thresholds(Part):
    """Which share of a list must hold."""

    change: Share = 1.0
    keep: Share = 1.0


class Perplexity(Part):
    """How much more perplexed by ordinary text the model may be than before, as a share."""

    rise: float = Field(ge=0, strict=True, allow_inf_nan=False)


class MultipleChoice(Part):
    """How many general questions fewer may be answered right than before.

    Attributes:
        fall: as a share of the questions.
        questions: how many are asked, from the beginning of the file.
        file: where they are; by default the file below the data folder (docs/data.md).
    """

    fall: Share
    questions: int = Field(MOST, ge=1, strict=True)
    file: Path | None = None


_Alone = (str, _Int, _Float)
"""What is a prompt without any field."""


def _asked(value: Any) -> Any:
    """Questions, of which some are only their prompt."""
    if not isinstance(value, list | tuple):
        return value
    return [{"prompt": one} if isinstance(one, _Alone) else one for one in value]


class Suite(Part):
    """What must hold."""

    change: tuple[Change, ...] = ()
    keep: Annotated[tuple[Keep, ...], BeforeValidator(_asked)] = ()
    thresholds: Thresholds = Thresholds()
    perplexity: Perplexity | None = None
    multiple_choice: MultipleChoice | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if not (self.change or self.keep or self.perplexity or self.multiple_choice):
            raise ValueError("it asks nothing; give change, keep, perplexity or multiple_choice")
        changed = {(one.prompt, one.chat) for one in self.change}
        for number, one in enumerate(self.keep, 1):
            if not one.answer and (one.prompt, one.chat) in changed:
                raise ValueError(f"keep, entry {number}: {one.prompt!r} is to change as well")
        return self

    def general(self) -> tuple[Probe, ...]:
        """The questions of its multiple choice; DataError if they are not to be had."""
        choice = self.multiple_choice
        return load_general(choice.file, limit=choice.questions).probes if choice else ()


PARTS: Mapping[str, type[Part]] = {
    "change": Change,
    "keep": Keep,
    "thresholds": Thresholds,
    "perplexity": Perplexity,
    "multiple_choice": MultipleChoice,
}


def make_suite(fields: Mapping[str, Any], *, place: str = "the suite") -> Suite:
    """A suite from plain values.

    Raises:
        OptionError: in one line, with `place`, the field or entry, and what is allowed.
    """
    if empty := [name for name in Suite.model_fields if fields.get(name, ()) is None]:
        raise OptionError(f"{place}: {empty[0]}: is empty; fill it, or leave it out")
    try:
        return Suite(**fields)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A misspelt field explains the one that is missing.
        misspelt = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
        raise OptionError(f"{place}: {_told(misspelt)}") from None


def _told(fault: Any) -> str:
    """A fault in words: where, and what is allowed there."""
    *at, last = fault["loc"] or ("",)
    if fault["type"] == "extra_forbidden":
        known = PARTS[at[0]] if at else Suite
        where = _place(at)
        return f"{where}unknown field {last!r}: {did_you_mean(str(last), known.model_fields)}"
    said = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
    if fault["type"] == "string_type" and not isinstance(fault["input"], list | dict):
        said += f"; {QUOTE}"
    if fault["type"] == "tuple_type":
        said = "should be a list"
    if fault["type"] == "model_type":
        said = f"should be fields: {', '.join(PARTS[fault['loc'][0]].model_fields)}"
    return f"{_place(fault['loc'])}{said}"


def _place(loc: Any) -> str:
    parts = [f"entry {part + 1}" if isinstance(part, int) else str(part) for part in loc]
    return f"{', '.join(parts)}: " if parts else ""


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file; the file of its questions is looked for from the suite's place.

    Raises:
        OptionError: not there, not YAML, or not a suite; naming the line or the field.
    """
    fields = _parsed(path)
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise OptionError(
            f"{path}: a suite is a mapping of fields: {', '.join(Suite.model_fields)}"
        )
    suite = make_suite(fields, place=str(path))
    choice = suite.multiple_choice
    if choice is None or choice.file is None:
        return suite
    beside = choice.model_copy(update={"file": path.parent / choice.file})
    return suite.model_copy(update={"multiple_choice": beside})


def _parsed(path: Path) -> Any:
    try:
        text = decode(read_bytes(path, OptionError), OptionError)
    except OptionError as error:
        raise OptionError(_named(path, str(error))) from None
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise OptionError(f"{path}: {line}not YAML ({error.problem})") from None
    except RecursionError:
        raise OptionError(f"{path}: not YAML (nested too deeply)") from None
    # A tag that does not fit its value (a date that is none) fails anywhere in the reader.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise OptionError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _named(path: Path, message: str) -> str:
    return message if message.startswith(str(path)) else f"{path}: {message}"


class _Loader(yaml.SafeLoader):
    """Refuses a field that comes twice, the first of which would silently be lost; numbers know how
    they were written."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = _Int(super().construct_yaml_int(node))
        number.written = node.value
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = _Float(super().construct_yaml_float(node))
        number.written = node.value
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"{key.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def write_suite(suite: Suite, path: Path) -> Path:
    """The suite as a YAML file that `read_suite` reads, whole or not at all."""
    fields = suite.model_dump(mode="json", exclude_defaults=True)
    if "thresholds" in fields:  # of two, both: one alone makes a reader ask
        fields["thresholds"] = suite.thresholds.model_dump()
    for one in (*fields.get("change", ()), *fields.get("keep", ())):
        for name in ("answer", "gone"):
            if len(one.get(name, ())) == 1:
                (one[name],) = one[name]
    if "keep" in fields:
        kept = fields["keep"]
        fields["keep"] = [one["prompt"] if list(one) == ["prompt"] else one for one in kept]
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
    return write_atomically(path, (HEADER + text).encode())
