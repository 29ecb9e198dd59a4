"""Plan: which methods run on which datasets, how; from the command line or a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from knowpatch.bench.schema import Mode
from knowpatch.data.general import MOST
from knowpatch.errors import OptionError, did_you_mean

Options = dict[str, Any]


class MethodPlan(BaseModel):
    """A method with options of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    options: Options = {}


class Plan(BaseModel):
    """What to run: every method on every dataset in every mode.

    Attributes:
        model, device, dtype: as `knowpatch.load` takes them.
        methods: names, or objects with `name` and `options`.
        datasets: names, NAME:SPLIT, files of cases, or "all" for the benchmark's own.
        modes: single (edit, score, give back), batch (all edits at once), sequential.
        limit: cases of each dataset; by default all.
        probes: most questions of each kind and case, chosen by their hash; by default all.
        metrics: names of metrics or groups; by default the standard ones.
        general: file of general questions, for metrics that ask them; by default the one below the
            data folder.
        questions: most general questions, from the beginning.
        seed: of the edits.
        chat: edit and ask through the chat template.
        ages: numbers of edits after which a sequential run is scored, besides its end; 0: each
            case right after its own edit, too.
        data: folder of the datasets; by default KNOWPATCH_DATA, else the hub.
        memory: most memory to use, for example "8GB".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[MethodPlan, ...] = Field(min_length=1)
    datasets: tuple[str, ...] = Field(min_length=1)
    modes: tuple[Mode, ...] = Field(("single",), min_length=1)
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = Field(None, ge=1)
    probes: int | None = Field(None, ge=1)
    metrics: tuple[str, ...] | None = Field(None, min_length=1)
    general: Path | None = None
    questions: int = Field(MOST, ge=1)
    seed: int = 0
    chat: bool = False
    ages: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    data: Path | None = None
    memory: str | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        many = [value] if isinstance(value, str | Mapping) else value
        if not isinstance(many, list | tuple):
            return value
        return [{"name": one} if isinstance(one, str) else one for one in many]

    @field_validator("datasets", "modes", "metrics", "ages", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) else value

    @field_validator("ages")
    @classmethod
    def _positive(cls, ages: tuple[int, ...]) -> tuple[int, ...]:
        if any(age < 0 for age in ages):
            raise ValueError("are numbers of edits, from 0")
        return tuple(sorted(set(ages)))

    @field_validator("memory", mode="before")
    @classmethod
    def _readable(cls, amount: Any) -> Any:
        text = str(amount) if isinstance(amount, int) else amount
        if isinstance(text, str):
            bytes_of(text)
        return text

    def absolute(self) -> Plan:
        """This plan with paths that hold wherever it is kept."""
        files = [str(Path(n).absolute()) if Path(n).is_file() else n for n in self.datasets]
        data, general = (path and path.absolute() for path in (self.data, self.general))
        update = {"datasets": tuple(files), "data": data, "general": general}
        return self.model_copy(update=update)

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else bytes_of(self.memory)


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def bytes_of(text: str) -> int:
    """Bytes of "8GB", "500 MB" or "2e9"; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?(?:e\d)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None or (size := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise ValueError(f"{text!r} is not an amount of memory; give it as 8GB or 500MB")
    return size


def make_plan(fields: Mapping[str, Any], *, place: str = "the plan") -> Plan:
    """A Plan from plain values.

    Raises:
        OptionError: in one line, with `place` and what is allowed.
    """
    try:
        return Plan(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = Plan if len(fault["loc"]) == 1 else MethodPlan
            hint = did_you_mean(str(fault["loc"][-1]), known.model_fields)
            raise OptionError(f"{place}: unknown field {name!r}: {hint}") from None
        said = fault["msg"].removeprefix("Value error, ")
        raise OptionError(f"{place}: {name or 'its values'}: {said}") from None


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; its data folder and its files are taken from its own place.

    Raises:
        OptionError: not there, not YAML, or not a plan.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path}: not YAML ({reason})") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise OptionError(f"{path}: a plan is a mapping of fields: {', '.join(Plan.model_fields)}")
    for name in ("data", "general"):
        if isinstance(fields.get(name), str):
            fields[name] = path.parent / fields[name]
    if isinstance(names := fields.get("datasets"), str | list):
        every = [names] if isinstance(names, str) else names
        fields["datasets"] = [_beside(path, name) for name in every]
    return make_plan(fields, place=str(path))


def _beside(plan: Path, name: Any) -> Any:
    """A dataset's name; of a file that lies beside the plan, its path."""
    there = isinstance(name, str) and (plan.parent / name).is_file()
    return str(plan.parent / name) if there else name
