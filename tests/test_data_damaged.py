"""Damaged data files: whatever is done to one, it loads or is refused in one line."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import samples

from knowpatch.data.jsonl import read_cases, write_cases
from knowpatch.data.source import load
from knowpatch.errors import DataError

MUTANTS = 2000 if os.environ.get("KNOWPATCH_SOAK") else 200
"""Mutants of each dataset's files."""
OWN = "own.jsonl"
STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, float("nan"), "", " ", "\0", "\ud800", "{}", "a\nb", "x" * 5000,
    [], [[]], [None], [""], [["", 1]], {}, {"": []}, {"a": 1}, {"str": 1}, {"a.b": [{}]},
]  # fmt: skip
"""What may stand where something else should."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inside):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def swapped(content: Any, chance: random.Random) -> Any:
    """A value is of another type, or another value of the file."""
    found = list(places(content))
    holder, key = chance.choice(found)
    other, taken = chance.choice(found)
    holder[key] = copy.deepcopy(chance.choice([*STRANGE, other[taken]]))
    return content


def without(content: Any, chance: random.Random) -> Any:
    """A field, or an entry of a list, is missing."""
    holder, key = chance.choice(list(places(content)))
    del holder[key]
    return content


def doubled(content: Any, chance: random.Random) -> Any:
    """An entry of a list comes twice."""
    lists = [content] if isinstance(content, list) else []
    lists += [h[k] for h, k in places(content) if isinstance(h[k], list)]
    some = [items for items in lists if items]
    if some:
        items = chance.choice(some)
        items.append(copy.deepcopy(chance.choice(items)))
    return content


def cut(text: bytes, chance: random.Random) -> bytes:
    return text[: chance.randrange(len(text))]


def flipped(text: bytes, chance: random.Random) -> bytes:
    """A few bytes are others."""
    damaged = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def spliced(text: bytes, chance: random.Random) -> bytes:
    """A piece of the file stands somewhere else."""
    start, end = sorted(chance.randrange(len(text)) for _ in range(2))
    at = chance.randrange(len(text))
    return text[:at] + text[start:end] + text[at:]


IN_JSON: list[Callable[[Any, random.Random], Any]] = [swapped, swapped, without, doubled]
IN_BYTES: list[Callable[[bytes, random.Random], bytes]] = [cut, flipped, flipped, spliced]


def mutant(content: Any, chance: random.Random, encode: Callable[[Any], bytes]) -> bytes:
    """The file's bytes, after one or two kinds of damage."""
    if chance.random() < 0.6:
        damaged = copy.deepcopy(content)
        for _ in range(chance.randint(1, 2)):
            damaged = chance.choice(IN_JSON)(damaged, chance) if damaged else damaged
        return encode(damaged)
    return chance.choice(IN_BYTES)(encode(content), chance)


def as_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=True).encode()


def as_lines(content: Any) -> bytes:
    return b"\n".join(as_json(record) for record in content)


def survives(name: str, path: Path, **options: Any) -> bool:
    """Whether it loads; anything but one line of DataError is the test's failure."""
    try:
        loaded = load(name, **options)
    except DataError as error:
        line = str(error)
        assert line.startswith(f"{path}: ") or f"{path} and " in line or f" and {path}: " in line
        assert len(line.splitlines()) == 1
        assert line.isprintable()
        return False
    # Whole cases: each text can be written, and is read as it was.
    again = write_cases(loaded.cases, path.with_name("again.jsonl"))
    assert tuple(read_cases(again)) == loaded.cases
    assert all(alias.strip() for c in loaded.cases for p in c.probes for alias in p.aliases)
    return True


@pytest.mark.parametrize("name", samples.CONTENTS)
def test_a_damaged_dataset_loads_or_is_refused(name: str, tmp_path: Path):
    """Cut, flipped, swapped, missing: one line, or cases that are whole."""
    chance = random.Random(name)
    contents = samples.CONTENTS[name]
    paths = samples.place(tmp_path, name, contents)
    outcomes = set()
    for _ in range(MUTANTS):
        number = chance.randrange(len(paths))
        paths[number].write_bytes(mutant(contents[number], chance, as_json))
        outcomes.add(survives(name, paths[number], data=tmp_path))
        paths[number].write_bytes(as_json(contents[number]))
    assert outcomes == {True, False}


def test_a_damaged_file_of_cases_loads_or_is_refused(tmp_path: Path):
    """The same for one's own file."""
    chance, path = random.Random(OWN), tmp_path / OWN
    outcomes = set()
    for _ in range(MUTANTS):
        path.write_bytes(mutant(samples.OWN, chance, as_lines))
        outcomes.add(survives(str(path), path))
    assert outcomes == {True, False}
