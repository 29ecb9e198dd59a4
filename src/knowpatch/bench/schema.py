"""What a results folder holds: a cell's description, and its rows.

    DIR/plan.yaml                     what was asked for
    DIR/cells/ID/cell.json            a CellFacts: model, method, dataset, mode, settings
    DIR/cells/ID/rows.jsonl           one Row a line, in the order in which they came
    DIR/cells/ID/patches/             patches of a cell that is not finished (batch, sequential)

A cell's ID is the hash of all that its rows depend on, so that rows never mix. Everything is plain
JSON: rows are read by whatever reads JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from knowpatch.errors import DataError
from knowpatch.files import whole_lines

Mode = Literal["single", "batch", "sequential"]
Values = dict[str, tuple[FiniteFloat, ...]]


class CellFacts(BaseModel):
    """What a cell is; all of it goes into the cell's ID.

    Attributes:
        model: source, fingerprint and form (dtype) of the model.
        method: its name; config: its options, all of them; seed: of the edits.
        dataset: name; split; digest: SHA-256 of its files.
        mode: single, batch or sequential.
        limit: cases in it; None where nothing says.
        probes: most probes of each kind and case; None for all.
        chat: whether edits and questions go through the chat template.
        metrics: names of the metrics.
        ages: numbers of edits after which a sequential cell is scored, besides the end; 0 for each
            case right after its own.
        versions: of knowpatch (its source's digest too), torch and transformers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, str]
    method: str
    config: dict[str, Any]
    seed: int
    dataset: str
    split: str
    digest: str
    mode: Mode
    limit: int | None
    probes: int | None
    chat: bool
    metrics: tuple[str, ...]
    ages: tuple[int, ...]
    versions: dict[str, str]


class ScoreRow(BaseModel):
    """One metric of one case: sub-kind ("" for none) to the values of its queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: Values = {}
    before: Values | None = None
    unscored: str | None = None


class Row(BaseModel):
    """One case, scored at one moment of its cell.

    Attributes:
        case: its id; index: its number in the dataset, from 0.
        subject: what it edits first, by which cases about one thing are told.
        edits: how many cases had been edited when it was scored (1 in single mode).
        age: how many edits came after its own, in sequential mode.
        final: whether this is the cell's last word on the case; rows at earlier ages are not.
        scores: by metric; a metric that does not apply to the case is left out.
        seconds: of computing its patch, per request; None where none was made.
        peak_mb: most memory in use while it was edited, in 10^6 bytes.
        error: why there are no scores, in one line; None where there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: str
    subject: str = ""
    index: int
    edits: int = 1
    age: int = 0
    final: bool = True
    scores: dict[str, ScoreRow] = {}
    seconds: float | None = None
    peak_mb: float | None = None
    error: str | None = None


def rows_of(folder: Path) -> list[Row]:
    """The rows of a cell; a last line that was cut by a kill is left out.

    Raises:
        DataError: a line that is not a row, with its place.
    """
    return list(_rows(folder / "rows.jsonl"))


def _rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(whole_lines(path), 1):
        try:
            yield Row.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            raise DataError(
                f"{path}, line {number}: not a row of results ({fault['msg']}); "
                "remove the line to have its case run again"
            ) from None


def facts_of(folder: Path) -> CellFacts:
    """What the cell in `folder` is.

    Raises:
        DataError: no cell there, or one of another version.
    """
    path = folder / "cell.json"
    try:
        return CellFacts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a cell of results ({reason}); remove its folder") from None


def dump(model: BaseModel) -> str:
    """One line of JSON, keys in order."""
    plain = model.model_dump(mode="json")
    return json.dumps(plain, ensure_ascii=False, sort_keys=True, allow_nan=False)
