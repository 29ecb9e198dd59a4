"""Text for statistics: what is found, read and refused, and rows of it without waste."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys

import pytest
import tiny

from knowpatch.edited import EditedModel
from knowpatch.errors import DataError, OptionError
from knowpatch.parts import text as texts
from knowpatch.parts.text import ROW_TOKENS, find_text, packed_rows

LONG = "The Nile flows through Egypt, and the sky above it is blue, as everyone knows who was there"
"""One more word and it counts as text in a JSON file."""


@pytest.fixture
def view(known):
    return known("llama").view


@pytest.fixture
def opening():
    """A view whose tokenizer puts a token in front of each text."""
    return EditedModel.of(*tiny.trained("llama", "sentencepiece")).view


def _write(path, *paragraphs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return str(path)


def _read(source):
    found = find_text(str(source))
    return [text for path in found.files for text in texts._texts(path)]


def _many(count):
    facts = list(tiny.FACTS.items())
    return [f"{facts[i % 8][0]} {facts[i % 8][1]}, number {i}." for i in range(count)]


def _stream(view, source, tokens, seed=0):
    rows = packed_rows(view, find_text(source), tokens, seed=seed)
    assert all(len(row) == ROW_TOKENS for row in rows[:-1])
    assert 0 < len(rows[-1]) <= ROW_TOKENS
    return [token for row in rows for token in row]


# -- finding ---------------------------------------------------------------------------------------


def test_a_text_file_is_its_paragraphs(tmp_path):
    """Paragraphs stand between lines that are empty or blank, whatever ends a line."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo\n\nthree\r\n \t\r\nfour\n\n\n\nfive\n".encode())
    assert [t.strip() for t in _read(path)] == ["one\ntwo", "three", "four", "five"]


def test_json_files_are_their_long_strings(tmp_path):
    """Strings of more than 100 characters at any depth, in order; names of fields are none."""
    a, b, c = (f"{LONG} {word} again" for word in ("once", "twice", "thrice"))
    nested = {"title": "short", LONG * 2: [a, {"deep": [[b]], "n": 3}], "last": c, "none": None}
    (tmp_path / "a.json").write_text(json.dumps(nested))
    assert _read(tmp_path / "a.json") == [a, b, c]
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(a)}\n\n{json.dumps({'text': b})}\n")
    assert _read(tmp_path / "b.jsonl") == [a, b]


def test_a_folder_is_the_files_below_it(tmp_path):
    """Sorted, at any depth, of the kinds that are text."""
    _write(tmp_path / "b.md", "four")
    _write(tmp_path / "a" / "z.txt", "two", "three")
    _write(tmp_path / "a" / "b" / "c.TXT", "one")
    _write(tmp_path / "c.py", "not this")
    found = find_text(str(tmp_path))
    assert _read(tmp_path) == ["one", "two", "three", "four"]
    assert found.name == tmp_path.name


def test_the_digest_is_of_the_content(tmp_path):
    """It changes with the content (of a folder also with its files' names), not the place."""
    one, two = _write(tmp_path / "1.txt", "a"), _write(tmp_path / "2.txt", "a")
    assert find_text(one).digest == find_text(two).digest
    assert len(find_text(one).digest) == 64
    folder = str(tmp_path)
    seen = {find_text(folder).digest}
    _write(tmp_path / "2.txt", "other")
    seen.add(find_text(folder).digest)
    os.rename(two, tmp_path / "0.txt")
    seen.add(find_text(folder).digest)
    assert len(seen) == 3
    assert find_text(one).digest not in seen
    _write(tmp_path / "1.txt", "b, and more")
    assert find_text(one).digest != find_text(str(tmp_path / "0.txt")).digest


def test_nothing_is_written_to_find_text(tmp_path, monkeypatch):
    """A dry run finds the text too, and leaves the cache alone."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "cache"))
    find_text(None)
    find_text(_write(tmp_path / "a.txt", "a"))
    assert not (tmp_path / "cache").exists()


def test_the_librarys_own_choice(monkeypatch):
    """Wikipedia summaries where the package is installed, else what the model writes."""
    if importlib.util.find_spec(texts.SUMMARIES_PACKAGE) is None:
        pytest.skip(f"{texts.SUMMARIES_PACKAGE} is not installed")
    found = find_text(None)
    assert found.name == "wikipedia-summaries"
    assert len(found.digest) == 64
    monkeypatch.setattr(texts, "SUMMARIES_PACKAGE", "no_such_package_here")
    assert find_text(None) == texts.Text("self-sampled", "")


@pytest.mark.parametrize(
    "source",
    ["none.txt", "./none", "/none/such", "a/b/c", "~/no-such-folder-here", "~nobody-here/a", ""],
)
def test_a_path_that_leads_nowhere(source, tmp_path, monkeypatch):
    """One line that says so."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        find_text(source)


def test_what_is_no_text_is_refused(tmp_path):
    """A file of another kind, a device, and a folder without text, each in one line."""
    _write(tmp_path / "sub" / "a.py", "x")
    for source, said in (("sub/a.py", "text is read from"), ("sub", "below it")):
        with pytest.raises(DataError, match=said):
            find_text(str(tmp_path / source))
    with pytest.raises(DataError, match="text is read from"):
        find_text("/dev/null")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe", "byte 0 is not UTF-8"),
        ("a.json", b'{"a": ', "not JSON"),
        ("a.jsonl", b'"fine"\n{"a"\n', "line 2: not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_one_line(view, tmp_path, name, content, said):
    """With its path and what is wrong."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        packed_rows(view, find_text(str(path)), 100, seed=0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- rows without waste ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
def test_just_as_many_tokens_as_asked_for(view, tmp_path, tokens):
    """Full rows, and one that holds the rest."""
    source = _write(tmp_path / "a.txt", *_many(100))
    assert len(_stream(view, source, tokens)) == tokens


def test_fewer_tokens_are_the_beginning_of_more(view, tmp_path):
    """Of the same text and seed; another seed takes another order."""
    source = _write(tmp_path / "a.txt", *_many(100))
    large = _stream(view, source, 1500)
    assert _stream(view, source, 1500) == large
    assert _stream(view, source, 300) == large[:300]
    assert _stream(view, source, 1500, seed=1) != large


def test_every_text_is_there_once(view, tmp_path, caplog):
    """With more tokens asked for than there are, all texts come, each once, whole and shuffled."""
    paragraphs = _many(30)
    source = _write(tmp_path / "a.txt", *paragraphs)
    with caplog.at_level(logging.WARNING):
        ids = _stream(view, source, 10**6)
    assert f"a.txt holds {len(ids)} tokens" in caplog.text
    end = view.tokenizer.eos_token_id
    read, piece = [], []
    for token in [*ids, end]:
        if token == end:
            read.append(view.decode(piece))
            piece = []
        else:
            piece.append(token)
    assert sorted(read) == sorted(paragraphs)
    assert read != paragraphs


def test_texts_begin_with_the_tokenizers_own_token(opening, tmp_path):
    """Where it has one; then nothing else stands between two."""
    paragraphs = _many(30)
    ids = _stream(opening, _write(tmp_path / "a.txt", *paragraphs), 10**6)
    first = opening.tokenizer.bos_token_id
    assert ids[0] == first
    assert ids.count(first) == len(paragraphs)
    assert opening.tokenizer.eos_token_id not in ids
    assert len(ids) == sum(len(opening.encode(text).ids) for text in paragraphs)


def test_no_token_between_texts_where_there_is_none(view, tmp_path, monkeypatch):
    """A tokenizer that neither begins nor ends a text gives them side by side."""
    paragraphs = _many(5)
    monkeypatch.setattr(view, "tokenizer", tiny.tokenizer.__wrapped__())
    view.tokenizer.eos_token = None
    ids = _stream(view, _write(tmp_path / "a.txt", *paragraphs), 10**6)
    assert len(ids) == sum(len(view.encode(text).ids) for text in paragraphs)


def test_long_texts_are_cut(view, tmp_path):
    """A book without empty lines is many texts, cut between words, and no word is lost."""
    words = " ".join(_many(300))
    pieces = list(texts._cut(words))
    assert len(pieces) > 3
    assert all(0 < len(piece) <= texts.LONGEST for piece in pieces)
    assert " ".join(pieces) == words
    unspaced = list(texts._cut("x" * 5000))
    assert "".join(unspaced) == "x" * 5000
    assert list(texts._cut(" \n ")) == []


def test_no_text_at_all_is_refused(view, tmp_path):
    """An empty file, and JSON with nothing but labels."""
    (tmp_path / "a.json").write_text('["short", {"a": "label"}]')
    for source in (_write(tmp_path / "a.txt", " ", ""), str(tmp_path / "a.json")):
        with pytest.raises(DataError, match="holds no text"):
            packed_rows(view, find_text(source), 100, seed=0)


@pytest.mark.parametrize("count", [100, 3])
def test_progress_is_told_to_its_end(view, tmp_path, count):
    """One stage, from nothing to all, whether or not there is enough text."""
    told = []
    source = find_text(_write(tmp_path / "a.txt", *_many(count)))
    packed_rows(view, source, 300, seed=0, progress=lambda *step: told.append(step))
    assert {stage for stage, _, _ in told} == {"reading text"}
    assert [told[0][1], told[-1][1]] == [0, 300]
    assert sum(done == total for _, done, total in told) == 1


def test_a_model_writes_its_own_text(view, monkeypatch):
    """Without the optional package: as much as asked, repeatable, another seed another text."""
    monkeypatch.setattr(texts, "SUMMARIES_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(texts, "WRITTEN", 6)
    first = _stream(view, None, 500)
    assert len(first) == 500
    assert _stream(view, None, 500) == first
    assert _stream(view, None, 150) == first[:150]
    assert _stream(view, None, 500, seed=1) != first


# -- the hub ---------------------------------------------------------------------------------------

CLIENT = '''
"""Stands for the client of the hub: knows one dataset, and notes how it was asked."""

import random

ASKED = []


class Rows(list):
    def shuffle(self, seed, buffer_size):
        mixed = Rows(self)
        random.Random(seed).shuffle(mixed)
        return mixed


def load_dataset(name, config, *, split, streaming):
    ASKED.append((name, config, split, streaming))
    if name == "lost":
        raise ConnectionError("Couldn't reach the hub\\nat all")
    column = "body" if config == "other" else "text"
    return Rows({column: f"A text, number {i}, about nothing at all."} for i in range(200))
'''


@pytest.fixture
def client(tmp_path, monkeypatch):
    """The package is installed, so to say; a list of what was asked."""
    folder = tmp_path / "client"
    folder.mkdir()
    (folder / f"{texts.HUB_PACKAGE}.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(folder)
    yield lambda: sys.modules[texts.HUB_PACKAGE].ASKED
    sys.modules.pop(texts.HUB_PACKAGE, None)


def test_a_hub_dataset_is_read_as_a_stream(view, client):
    """By NAME or NAME:CONFIG, its column "text" of "train"; the hub is asked only for reading."""
    found = find_text("some/thing:small")
    assert texts.HUB_PACKAGE not in sys.modules
    assert (found.name, found.digest) == ("some/thing:small", "some/thing:small")
    large = _stream(view, "some/thing:small", 900)
    assert client() == [("some/thing", "small", "train", True)]
    assert _stream(view, "some/thing:small", 200) == large[:200]
    assert _stream(view, "thing", 900, seed=1) != large
    assert client()[-1] == ("thing", None, "train", True)


def test_a_hub_dataset_that_is_not_to_be_had(view, client):
    """Whatever the client raises is one line; so is a dataset without the column."""
    with pytest.raises(DataError, match=r"lost: no such file or folder, .*Couldn't reach") as lost:
        packed_rows(view, find_text("lost"), 100, seed=0)
    assert "\n" not in str(lost.value)
    with pytest.raises(DataError, match="no 'text', but body"):
        packed_rows(view, find_text("some:other"), 100, seed=0)


def test_a_hub_dataset_without_its_package(monkeypatch):
    """What to install is said."""
    monkeypatch.setattr(texts, "HUB_PACKAGE", "no_such_package_here")
    with pytest.raises(OptionError, match=r"no file and no folder.*pip install"):
        find_text("some/thing")


def test_the_models_own_text_can_be_asked_for():
    """`self` is the model's own text, whether or not another one is installed."""
    assert find_text("self") == texts.Text("self-sampled", "")
