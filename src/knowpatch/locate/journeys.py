"""Round trips of many facts by several methods: rows that a stopped run goes on from, and means.

A method's rows are kept under the hash of all that they depend on: the model, the method with its
options, the facts' file, the seed, and the library's source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowpatch.bench.statistics import Summary, bootstrap
from knowpatch.edited import EditedModel
from knowpatch.errors import EditError, InputError
from knowpatch.files import append_lines, kept_in, source_digest, whole_lines
from knowpatch.locate.roundtrip import IGNORED, Trip, round_trip
from knowpatch.method import EditMethod
from knowpatch.progress import Progress, silent

Row = dict[str, Any]
ERROR = "error"
WAYS = ("edited_back", "dropped")
"""The two ways back."""
SHARES = ("success", "failed")
"""Numbers that are shares of facts."""


def rows_at(model: EditedModel, method: EditMethod, data: str) -> Path:
    """The file of a method's rows.

    Args:
        data: what names the facts' file, its content included.
    """
    recipe = [model.view.fingerprint, model.view.form, method.name, method.seed, data]
    recipe += [method.config.model_dump(mode="json"), source_digest()]
    return kept_in("roundtrip", json.dumps(recipe, sort_keys=True), ".jsonl")


def run(
    model: EditedModel,
    method: EditMethod,
    some: Sequence[Trip],
    path: Path,
    *,
    progress: Progress = silent,
) -> list[Row]:
    """The rows of these trips, in order; those that are in the file are not made again.

    A fact that cannot be edited is a row with its error.
    """
    done: dict[str, Row] = {}
    for line in whole_lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # then it is made again
            row = json.loads(line)
            done[row["trip"]] = row
    stage = f"there and back by {method.name}"
    for number, trip in enumerate(some):
        progress(stage, number, len(some))
        if _key(trip) not in done:
            done[_key(trip)] = row = {"trip": _key(trip), **_row(model, method, trip)}
            append_lines(path, [json.dumps(row, allow_nan=False)])
    progress(stage, len(some), len(some))
    return [done[_key(trip)] for trip in some]


def _key(trip: Trip) -> str:
    """What names a trip: two cases of one id in different files are not the same."""
    return hashlib.sha256(repr(trip).encode()).hexdigest()[:16]


def _row(model: EditedModel, method: EditMethod, trip: Trip) -> Row:
    try:
        return round_trip(model, method, trip)
    except (EditError, InputError) as error:
        return {"case": trip.id, "method": method.name, ERROR: str(error)}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers in one list: those of the ways back under "way.name"."""
    found = {
        name: row.get(name)
        for name in ("success", "there", "back", "weights_left", "cosine", "kl_there")
    }
    for way in WAYS:
        part = dict(row.get(way) or {})
        if part.get("ignored") is not None:
            part["failed"] = float(part["ignored"] > IGNORED)
        found |= {f"{way}.{name}": value for name, value in part.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def means(rows: Sequence[Row]) -> dict[str, Summary]:
    """Each number's mean over the facts that have it, with its interval."""
    records = [numbers(row) for row in rows if ERROR not in row]
    names = dict.fromkeys(name for record in records for name in record)
    found = {}
    for name in names:
        share = name.rpartition(".")[2] in (*SHARES, "bytes_same")
        some = [{"value": record[name]} if name in record else None for record in records]
        found[name] = bootstrap(some, share=share)
    return {name: summary for name, summary in found.items() if summary is not None}
