"""Damaged suites: whatever is done to one, it is read or refused in one line that names it."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_data_damaged import STRANGE, places

from knowpatch.checks.suite import Suite, read_suite, write_suite
from knowpatch.errors import KnowpatchError, OptionError

MUTANTS = 2000 if os.environ.get("KNOWPATCH_SOAK") else 200
TEXT = """# a suite
change:
  - prompt: The capital of Australia is
    answer: [Canberra, the city of Canberra]
    chat: true
  - {prompt: The code of the door is, answer: 4711, gone: "1234"}
keep:
  - The capital of New Zealand is
  - prompt: "The capital of \\u00d6sterreich is"
    answer: Wien
thresholds: {change: 1, keep: 0.95}
perplexity:
  rise: 0.05
multiple_choice: {fall: 0.02, questions: 5, file: mine.jsonl}
"""
PIECES = (
    *(b"\xff", b"\0", b"\t", b"- ", b": ", b"{", b"]", b"*a", b"&a ", b"<<: ", b"'", b'"\\'),
    *(b"!!int ", b"!!set ", b"!!timestamp ", b"!!binary ", b"!!bool ", b"\n---\n", b"? ", b"|\n"),
    *(b"%", b"=", b".nan", b"1e999", b"2020-99-99", b"\xed\xa0\x80"),
    b"!!python/object/apply:os.abort []",
)
"""What may turn up in a file; nothing of it may run, hang or end in a traceback."""


def cut(content: bytes, chance: random.Random) -> bytes:
    """Its end is missing, or a part of the middle."""
    start, stop = sorted(chance.choices(range(len(content)), k=2))
    return content[:start] + chance.choice([b"", content[stop:]])


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Some bytes are others."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def inserted(content: bytes, chance: random.Random) -> bytes:
    """Something stands in between that YAML has a meaning for."""
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(content))
        content = content[:at] + chance.choice(PIECES) + content[at:]
    return content


def repeated(content: bytes, chance: random.Random) -> bytes:
    """A line comes twice, or lines have changed places."""
    lines = content.splitlines(keepends=True)
    one, other = (chance.randrange(len(lines)) for _ in range(2))
    if chance.random() < 0.5:
        lines.insert(one, lines[other])
    else:
        lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def strange(content: bytes, chance: random.Random) -> bytes:
    """A value is of another type, or a field is called otherwise."""
    fields = yaml.safe_load(content)
    holder, key = chance.choice(list(places(fields)))
    if isinstance(holder, dict) and chance.random() < 0.2:
        holder[chance.choice(["promt", "", 1, None, "x" * 3000])] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(chance.choice(STRANGE))
    dumped: bytes = yaml.safe_dump(fields, allow_unicode=False, encoding="utf-8")
    return dumped


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [cut, flipped, inserted, repeated, strange]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_suite_is_read_or_refused_in_one_line(damage: Any, tmp_path: Path):
    """No traceback and no second line; what is refused is named, what is read can be written."""
    path, again = tmp_path / "suite.yaml", tmp_path / "again.yaml"
    refused = 0
    for number in range(MUTANTS // len(DAMAGES)):
        path.write_bytes(damage(TEXT.encode(), random.Random(f"{damage.__name__} {number}")))
        try:
            suite = read_suite(path)
        except OptionError as error:
            refused += 1
            line = str(error)
            assert "\n" not in line
            assert line.startswith(f"{path}: ")
            assert len(line) > len(f"{path}: ") + 8
        else:
            assert isinstance(suite, Suite)
            assert read_suite(write_suite(suite, again)).change == suite.change
    assert refused > MUTANTS // len(DAMAGES) // 10


def test_a_suite_whose_questions_are_missing_names_their_file(tmp_path: Path):
    """What a sound suite needs besides is refused as clearly."""
    (tmp_path / "suite.yaml").write_text(TEXT)
    with pytest.raises(KnowpatchError, match=r"mine\.jsonl: no such file$"):
        read_suite(tmp_path / "suite.yaml").general()


def test_a_bomb_of_references_costs_nothing(tmp_path: Path):
    """Nine lists of nine references each: refused without being unfolded."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (tmp_path / "suite.yaml").write_text("\n".join([*lines, "keep: *i"]))
    with pytest.raises(OptionError, match="unknown field 'a'"):
        read_suite(tmp_path / "suite.yaml")
