"""Dataset: what every dataset is. One file holds one dataset: its facts and its generator.

A dataset names its files, says what they are, and turns their parsed content into cases. Where the
files come from (a folder, or the hub) is not its business: see source.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from knowpatch.data.case import Case
from knowpatch.registry import Registry

Files = Mapping[str, Sequence[str]]
"""For each split its files."""


@dataclass(frozen=True)
class Hub:
    """A dataset repository on the hub, at one revision."""

    repo: str
    revision: str
    folder: str = ""
    """Where the repository's own root lies below a data folder."""


class Dataset(ABC):
    """One dataset.

    Class attributes:
        name: as on the command line; the file's stem.
        about: what it asks, one line.
        paper: where it was published.
        kind: insert, modify or erase: what its edits are; none where it has none.
        suite: the benchmark that it is a part of, if any.
        files: for each split its files, as paths below a data folder.
        default_split: the split that is meant where none is named.
        hub: where the files can be fetched from; None where they cannot.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[str]
    suite: ClassVar[str | None] = None
    files: ClassVar[Files]
    default_split: ClassVar[str] = "test"
    hub: ClassVar[Hub | None] = None

    @abstractmethod
    def cases(self, *contents: Any) -> Iterator[Case]:
        """The cases of a split, in order, from the parsed content of its files.

        Raises:
            DataError: content that is not this dataset's; naming the record and what is wrong.
        """


DATASETS: Registry[type[Dataset]] = Registry(
    "dataset",
    package="knowpatch.data.sets",
    group="knowpatch.datasets",
    variable="KNOWPATCH_DATASETS",
)

register = DATASETS.register
"""Decorator that enters a dataset under its file's stem."""
