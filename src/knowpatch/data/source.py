"""Where cases come from: a dataset of the registry in a folder or from the hub, or one's own file.

A data folder is named by argument or by KNOWPATCH_DATA. It holds the files under the paths that a
dataset names ("KnowEdit/benchmark/..."), or is a hub repository's own root ("benchmark/...").
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from knowpatch.data import hub
from knowpatch.data.case import Case
from knowpatch.data.dataset import DATASETS, Dataset
from knowpatch.data.draft import marked
from knowpatch.data.jsonl import cases_of
from knowpatch.errors import DataError, OptionError, did_you_mean
from knowpatch.reading import decode, parse, read_bytes

VARIABLE = "KNOWPATCH_DATA"
OWN = ".jsonl"
ALL = "all"
"""The split of a file of one's own, and the name of all suites together."""


@dataclass(frozen=True)
class Loaded:
    """Cases that were loaded.

    Attributes:
        name, split: of the dataset; of one's own file its name, and "all".
        cases: as many as were asked for.
        digest: SHA-256 of the files' contents, one after the other.
        paths: the files.
        source: the dataset's class; none for a file of one's own.
    """

    name: str
    split: str
    cases: tuple[Case, ...]
    digest: str
    paths: tuple[Path, ...]
    source: tuple[type[Dataset], ...] = ()

    def sampled(self, probes: int | None) -> Loaded:
        """With at most `probes` questions of each kind in a case."""
        return replace(self, cases=tuple(case.sampled(probes) for case in self.cases))


def load(
    name: str,
    *,
    split: str | None = None,
    data: Path | None = None,
    limit: int | None = None,
) -> Loaded:
    """Load the cases of a dataset, or of a file of JSON lines.

    Args:
        name: a dataset, a dataset and its split ("NAME:SPLIT"), or the path of a .jsonl file.
        split: by default the dataset's own default.
        data: folder with the files; by default KNOWPATCH_DATA, then the hub.
        limit: most cases, from the beginning; only these are checked.

    Raises:
        OptionError: an unknown dataset or split, or a limit below 1.
        DataError: files that cannot be found or read; naming file and record.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"limit {limit}: at least 1 case has to be loaded")
    if Path(name).suffix.lower() == OWN:
        if split not in (None, ALL):
            raise OptionError(f"{name}: a file has no split {split!r}; leave the split out")
        path = Path(name)
        content = read_bytes(path, DataError)
        cases = _cases(marked(cases_of(content)), limit, [path])
        return Loaded(path.name, ALL, cases, hashlib.sha256(content).hexdigest(), (path,))
    dataset, chosen = resolve(name, split)
    paths = find(dataset, chosen, data)
    contents = [read_bytes(path, DataError) for path in paths]
    parsed = [_parsed(content, path) for content, path in zip(contents, paths, strict=True)]
    cases = _cases(marked(dataset().cases(*parsed)), limit, paths)
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    return Loaded(dataset.name, chosen, cases, digest, tuple(paths), (dataset,))


def resolve(name: str, split: str | None = None) -> tuple[type[Dataset], str]:
    """The dataset and the split that a name means; OptionError if there is none such."""
    if Path(name).is_file():
        raise DataError(
            f"{name}: a file of cases ends in {OWN}; see docs/data.md for what it holds"
        )
    stem, colon, named = name.partition(":")
    dataset = DATASETS.get(stem)
    if colon and split not in (None, named):
        raise OptionError(f"{name}: names another split than {split!r}; give one of them")
    chosen = named if colon else split or dataset.default_split
    if chosen not in dataset.files:
        hint = did_you_mean(chosen, dataset.files)
        raise OptionError(f"dataset {stem!r} has no split {chosen!r}: {hint}")
    return dataset, chosen


def dataset_of(path: Path) -> tuple[str, Path] | None:
    """The dataset and split (NAME:SPLIT) that a file is, and the data folder that it lies in.

    None where no split consists of just one file of this name.
    """
    whole = path.resolve()
    for name in DATASETS.names():
        for split, files in DATASETS.get(name).files.items():
            parts = Path(files[0]).parts
            if len(files) == 1 and whole.parts[-len(parts) :] == parts:
                return f"{name}:{split}", whole.parents[len(parts) - 1]
    return None


def expanded(names: Sequence[str]) -> list[str]:
    """The names, with a suite's replaced by those of its datasets; each once, in order."""
    found: list[str] = []
    known = set(DATASETS.names())
    for name in names:
        plain = name.partition(":")[0] in known or Path(name).suffix.lower() == OWN
        found += [name] if plain else _suite(name) or [name]
    return list(dict.fromkeys(found))


def _suite(name: str) -> list[str]:
    suites = {known: DATASETS.get(known).suite for known in DATASETS.names()}
    return [known for known, suite in suites.items() if suite and name in (suite, ALL)]


def find(dataset: type[Dataset], split: str, data: Path | None = None) -> list[Path]:
    """The files of a split: in the data folder, else from the hub.

    Raises:
        DataError: one line that says which file is missing and how to give it.
    """
    folder = data_folder(data)
    return [
        _in_folder(dataset, file, folder) or _from_hub(dataset, file, folder)
        for file in dataset.files[split]
    ]


def present(dataset: type[Dataset], split: str, data: Path | None = None) -> list[Path] | None:
    """The files of a split, if all of them are here already; the hub is not asked."""
    folder = data_folder(data)
    paths = []
    for file in dataset.files[split]:
        path = _in_folder(dataset, file, folder)
        if path is None and (home := dataset.hub) and (there := hub.inside(home, file)):
            path = hub.kept(home, there)
        if path is None:
            return None
        paths.append(path)
    return paths


def data_folder(data: Path | None) -> Path | None:
    """The folder that is given, or that the environment names; DataError if it is none."""
    named = data or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None and not named.is_dir():
        raise DataError(f"{named}: no such data folder; give another with --data or {VARIABLE}")
    return named


def _in_folder(dataset: type[Dataset], file: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    there = hub.inside(dataset.hub, file) if dataset.hub else None
    places = [folder / place for place in (file, there) if place]
    return next((path for path in places if path.is_file()), None)


def _from_hub(dataset: type[Dataset], file: str, folder: Path | None) -> Path:
    if dataset.hub and (there := hub.inside(dataset.hub, file)):
        return hub.fetched(dataset.hub, there)
    where = f"is not below {folder}" if folder else "has to be given"
    raise DataError(
        f"{dataset.name}: {file} {where}; the hub does not have it: "
        f"give the folder that holds it with --data DIR (or {VARIABLE})"
    )


def _parsed(content: bytes, path: Path) -> Any:
    try:
        return parse(decode(content, DataError), DataError)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _cases(cases: Iterator[Case], limit: int | None, paths: Sequence[Path]) -> tuple[Case, ...]:
    try:
        return tuple(islice(cases, limit))
    except DataError as error:
        raise DataError(f"{' and '.join(map(str, paths))}: {error}") from None
