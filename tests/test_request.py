"""EditRequest and the files that hold requests: request.py."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from knowpatch.errors import RequestError
from knowpatch.request import REFUSAL, EditRequest, make_request, read_requests

FRANCE = {"prompt": "The capital of France is", "target": "Lyon"}
FULL = {
    **FRANCE,
    "subject": "France",
    "old": "Paris",
    "kind": "modify",
    "rephrases": ["France's capital:", "Ask for the capital of France:"],
    "id": "f1",
}

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file with exactly these bytes and gives its path."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def as_csv(*rows: dict) -> str:
    """Rows as a spreadsheet would write them, rephrases in one cell."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(FULL))
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "rephrases": "|".join(row.get("rephrases", []))})
    return out.getvalue()


def as_lines(*rows: dict) -> str:
    return "\n".join(json.dumps(row) for row in rows)


FORMATS = {
    "a.json": lambda *rows: json.dumps(rows),
    "a.jsonl": as_lines,
    "a.csv": as_csv,
    "a.yaml": lambda *rows: yaml.safe_dump(list(rows), allow_unicode=True),
    "a.yml": lambda *rows: yaml.safe_dump(list(rows)),
    "A.JSON": lambda *rows: json.dumps(rows),
}


def refusal(path: Path) -> str:
    """The one line with which `path` is refused; it begins with the file's name."""
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(path))
    return said


# -- EditRequest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "target"),
    [
        pytest.param({"target": "Lyon"}, "insert", "Lyon", id="insert"),
        pytest.param({"target": "Lyon", "old": "Paris"}, "modify", "Lyon", id="old-given"),
        pytest.param({"target": "Lyon", "old": None}, "insert", "Lyon", id="old-none"),
        pytest.param(
            {"target": "Lyon", "old": "Paris", "kind": "insert"}, "insert", "Lyon", id="said-so"
        ),
        pytest.param({"kind": "erase"}, "erase", REFUSAL, id="erase"),
        pytest.param({"kind": "erase", "target": None}, "erase", REFUSAL, id="erase-none"),
        pytest.param({"kind": "erase", "old": "Paris"}, "erase", REFUSAL, id="erase-old"),
        pytest.param({"kind": "erase", "target": "No."}, "erase", "No.", id="erase-with-target"),
    ],
)
def test_defaults(fields: dict, kind: str, target: str):
    """The kind follows from the old answer, and an erasure has a refusal as its target."""
    request = make_request(prompt=FRANCE["prompt"], **fields)
    assert (request.kind, request.target) == (kind, target)


def test_only_prompt_and_target_are_needed():
    """What is not given is None or empty."""
    request = make_request(**FRANCE)
    assert (request.subject, request.old, request.rephrases, request.id) == (None, None, (), None)


def test_a_request_is_a_frozen_value():
    """Equal fields make equal requests, which hash alike and cannot be changed."""
    one, other = make_request(**FULL), make_request(**FULL)
    assert one == other
    assert len({one, other}) == 1
    with pytest.raises(ValidationError):
        one.target = "Rome"


def test_a_request_comes_back_from_its_own_json():
    """A request that is dumped and read again is the same one, a default kind included."""
    for fields in (FRANCE, FULL, {"prompt": "x", "kind": "erase"}):
        request = make_request(**fields)
        assert EditRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize("old", ["Lyon", " Lyon", "Lyon\n"])
def test_a_target_that_is_the_old_answer_is_warned_of(old: str, caplog: pytest.LogCaptureFixture):
    """An edit with nothing to learn goes ahead, with a warning that names the target."""
    with caplog.at_level(logging.WARNING, logger="knowpatch.request"):
        request = make_request(**FRANCE, old=old)
    assert request.kind == "modify"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'Lyon'" in caplog.text


def test_an_ordinary_request_warns_of_nothing(caplog: pytest.LogCaptureFixture):
    """No warning without a reason."""
    with caplog.at_level(logging.WARNING):
        make_request(**FULL)
    assert not caplog.records


@pytest.mark.parametrize(("given", "text"), [(42, "42"), (0, "0"), (-1.5, "-1.5"), (1e3, "1000.0")])
def test_a_number_is_a_target_as_text(given: float, text: str):
    """A number given as the target or the old answer is taken as the text that it prints as."""
    request = make_request(prompt="Two plus two is", target=given, old=given + 1)
    assert request.target == text
    assert request.old == str(given + 1)


BAD = [
    pytest.param({"target": "x"}, ["prompt", "required"], id="no-prompt"),
    pytest.param({"prompt": "x"}, ["target is missing"], id="no-target"),
    pytest.param({"prompt": "x", "target": ""}, ["target is empty"], id="empty-target"),
    pytest.param({"prompt": "x", "target": " \n"}, ["target is empty"], id="blank-target"),
    pytest.param({"prompt": "\t", "target": "x"}, ["prompt is empty"], id="blank-prompt"),
    pytest.param({**FRANCE, "old": " "}, ["old is empty"], id="blank-old"),
    pytest.param({**FRANCE, "subject": ""}, ["subject is empty"], id="empty-subject"),
    pytest.param(
        {**FRANCE, "subject": "Spain"},
        ["subject 'Spain' is not in the prompt 'The capital of France is'"],
        id="absent-subject",
    ),
    pytest.param(
        {**FRANCE, "subject": "france"}, ["'france' is not in"], id="subject-in-other-case"
    ),
    pytest.param(
        {**FRANCE, "kind": "delete"}, ["kind", "'insert'", "'modify'", "'erase'"], id="unknown-kind"
    ),
    pytest.param({**FRANCE, "prompt": ["x"]}, ["prompt", "string"], id="prompt-is-a-list"),
    pytest.param({**FRANCE, "target": {"a": 1}}, ["target", "string"], id="target-is-an-object"),
    pytest.param({**FRANCE, "target": True}, ["target", "string"], id="target-is-a-truth-value"),
    pytest.param({**FRANCE, "rephrases": "x"}, ["rephrases"], id="rephrases-is-a-text"),
    pytest.param({**FRANCE, "rephrases": [[]]}, ["rephrases.0", "string"], id="rephrase-is-a-list"),
    pytest.param(
        {**FRANCE, "subjet": "France"},
        ["unknown field 'subjet'", "did you mean 'subject'", "allowed:", "rephrases"],
        id="unknown-field",
    ),
    pytest.param(
        {"promt": "x", "target": "y"},
        ["unknown field 'promt'", "did you mean 'prompt'"],
        id="misspelt-needed-field",
    ),
    pytest.param({**FRANCE, "a\nb": "x"}, ["unknown field"], id="field-of-two-lines"),
    pytest.param({**FRANCE, "target": "\ud800"}, ["target"], id="half-a-surrogate-pair"),
    pytest.param({**FRANCE, "rephrases": ["ok", " "]}, ["rephrases"], id="blank-rephrase"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_bad_fields_are_one_line(fields: dict, said: list[str]):
    """Each wrong field is a RequestError of one line that names it and what is allowed."""
    with pytest.raises(RequestError) as caught:
        make_request(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in said), message


# -- files of requests ---------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_requests(name: str, mark: bytes, write: Write):
    """json, jsonl, csv and yaml give equal requests in order, byte order mark or not."""
    rows = [FULL, FRANCE, {"prompt": "Сколько?", "target": "北京, 😀"}]
    path = write(name, mark + FORMATS[name](*rows).encode())
    assert read_requests(path) == [make_request(**row) for row in rows]


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_a_single_object_is_one_request(name: str, write: Write):
    """A JSON or YAML file may hold one object instead of a list."""
    path = write(name, json.dumps(FULL))
    assert read_requests(str(path)) == [make_request(**FULL)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"prompt": "2+2=", "target": 4, "old": 5, "id": 7}]'),
        ("a.jsonl", '{"prompt": "2+2=", "target": 4, "old": 5, "id": 7}'),
        ("a.csv", "prompt,target,old,id\n2+2=,4,5,7\n"),
        ("a.yaml", "- {prompt: 2+2=, target: 4, old: 5, id: 7}"),
    ],
)
def test_numbers_are_targets_in_every_format(name: str, content: str, write: Write):
    """Targets, old answers and ids that are numbers are read as their text."""
    wanted = make_request(prompt="2+2=", target="4", old="5", id="7")
    assert read_requests(write(name, content)) == [wanted]


SCALARS = ["12:30", "010", "1_000", "0x1F", "2024-01-02", "2024-13-45", "1.10", "1e3", "no", "~x"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        *[pytest.param(scalar, scalar, id=scalar) for scalar in SCALARS],
        pytest.param("1" * 5000, "1" * 5000, id="5000-digits"),
        pytest.param("!!int y", "y", id="not-an-int"),
        pytest.param("!!float y", "y", id="not-a-float"),
        pytest.param("!!timestamp y", "y", id="not-a-time"),
    ],
)
def test_yaml_does_not_rewrite_an_answer(written: str, text: str, write: Write):
    """An answer that YAML would take for a time, a date or an octal number is never changed unseen.

    It is read as it is written, or refused in one line that names the file.
    """
    path = write("a.yaml", f"- prompt: It opens at\n  target: {written}\n")
    try:
        (request,) = read_requests(path)
    except RequestError:
        assert len(refusal(path)) < 1000
    else:
        assert request.target == text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_and_line_ends_do_not_matter(end: str, write: Write):
    """JSON lines and CSV are read alike with both line ends, and blank lines are passed over."""
    one = json.dumps(FRANCE)
    assert len(read_requests(write("a.jsonl", f"{one}{end}{end}{one}{end}"))) == 2
    assert len(read_requests(write("a.csv", f"prompt,target{end}{end}a,b{end}{end}c,d{end}"))) == 2


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_json_line(character: str, write: Write):
    """A character that only Unicode calls a line end may stand within a line of JSON lines."""
    text = f"The capital{character}of France is"
    row = {"prompt": text, "target": "Lyon"}
    content = json.dumps(row, ensure_ascii=character < " ")
    assert read_requests(write("a.jsonl", content)) == [make_request(**row)]


def test_cells_of_a_csv_file(write: Write):
    """Quoted cells may hold commas, quotes and lines; an empty cell is a field not given."""
    content = 'prompt,subject,target,rephrases\n"A, ""b""\nc",,x,one | two\n'
    (request,) = read_requests(write("a.csv", content))
    assert request.prompt == 'A, "b"\nc'
    assert request.subject is None
    assert request.rephrases == ("one", "two")


def test_a_stray_bar_makes_no_empty_rephrase(write: Write):
    """Two bars in a row, or one at the end, do not make a rephrase without words."""
    path = write("a.csv", "prompt,target,rephrases\na,b,one||two|\n")
    try:
        (request,) = read_requests(path)
    except RequestError:
        return
    assert all(text.strip() for text in request.rephrases)


def test_a_missing_file(tmp_path: Path):
    """A file that is not there is named."""
    assert "no such file" in refusal(tmp_path / "none.json")


def test_a_folder_with_the_right_ending(tmp_path: Path):
    """A folder is refused, whatever it is called."""
    folder = tmp_path / "a.json"
    folder.mkdir()
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.gz", ".json"])
def test_an_unknown_ending(name: str, write: Write):
    """An unknown ending is refused with those that are known."""
    said = refusal(write(name, json.dumps(FRANCE)))
    assert all(ending in said for ending in (".json,", ".jsonl", ".csv", ".yaml", ".yml"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_not_utf8(name: str, encoding: str, write: Write):
    """A file in another encoding is refused with the place of the first wrong byte."""
    content = FORMATS[name](FRANCE).replace("Lyon", "Orl\u00e9ans").replace("\\u00e9", "é")
    said = refusal(write(name, content.encode(encoding)))
    assert "not UTF-8" in said
    assert "byte " in said


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", ["", "\n", " \n\n", "\ufeff"])
def test_an_empty_file(name: str, content: str, write: Write):
    """An empty file is an error, not an empty list of requests."""
    refusal(write(name, content))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.yaml", "[]"), ("a.csv", "prompt,target\n")]
)
def test_a_file_without_requests(name: str, content: str, write: Write):
    """A well-formed file that holds no request is an error that says what is wanted."""
    assert "at least one with prompt and target" in refusal(write(name, content))


# name, content, parts of the message: first the place, then what is wrong
BROKEN = [
    ("a.json", '[\n{"prompt": "x",}\n]', ["line 2", "not JSON"]),
    ("a.json", "[" * 100_000, ["line 1", "nested too deeply"]),
    ("a.json", '[{"prompt": "x", "target": ' + "1" * 5000 + "}]", ["line 1"]),
    ("a.json", '["x"]', ["entry 1", "expected an object"]),
    ("a.json", f"[{json.dumps(FRANCE)}, 3]", ["entry 2", "expected an object"]),
    ("a.json", "null", ["entry 1", "expected an object"]),
    ("a.json", '"x"', ["entry 1", "expected an object"]),
    ("a.json", f'[{json.dumps(FRANCE)}, {{"prompt": "x"}}]', ["entry 2", "target is missing"]),
    ("a.jsonl", as_lines(FRANCE) + "\n\n{bad}\n", ["line 3", "not JSON"]),
    ("a.jsonl", as_lines(FRANCE) + "\n[1]\n", ["line 2", "expected an object"]),
    ("a.jsonl", as_lines(FRANCE, {**FRANCE, "kind": "add"}), ["line 2", "kind", "'erase'"]),
    ("a.jsonl", as_lines(FRANCE) + "\n" + "[" * 100_000, ["line 2", "nested too deeply"]),
    ("a.jsonl", as_lines(FRANCE) + '\n{"prompt": ' + "1" * 5000 + "}", ["line 2"]),
    (
        "a.jsonl",
        as_lines(FRANCE, {**FRANCE, "targets": "x"}),
        ["line 2", "unknown field 'targets'", "did you mean 'target'"],
    ),
    (
        "a.jsonl",
        as_lines({**FRANCE, "subject": "Spain"}),
        ["line 1", "'Spain' is not in the prompt"],
    ),
    ("a.csv", "prompt,target\na,b\nc,d,e\n", ["line 3", "more cells than the header"]),
    ("a.csv", "prompt,target\na,b\nc\n", ["line 3", "target is missing"]),
    ("a.csv", "prompt,target,tarmac\na,b,\nc,d,e\n", ["line 3", "unknown field 'tarmac'"]),
    ("a.csv", 'prompt,target\na,b\n"c"x,d\n', ["line 3", "not CSV"]),
    ("a.csv", 'prompt,target\na,b\n"c,d\n', ["line 3", "not CSV"]),
    ("a.csv", "prompt,target\na,b\nc," + "d" * 200_000 + "\n", ["line 3", "not CSV"]),
    ("a.csv", "prompt;target\na;b\n", ["line 2", "unknown field 'prompt;target'"]),
    ("a.csv", "prompt,target,subject\na,b,z\n", ["line 2", "'z' is not in the prompt"]),
    ("a.yaml", "- prompt: x\n  target: [1\n", ["line 3", "not YAML"]),
    ("a.yaml", "- prompt: x\n\ttarget: y\n", ["line 2", "not YAML"]),
    ("a.yaml", "- x\n", ["entry 1", "expected an object"]),
    ("a.yaml", "a: 1\n---\nb: 2\n", ["line 2", "not YAML"]),
    ("a.yaml", "[" * 5000, ["nested too deeply"]),
    ("a.yaml", "!!python/object/apply:os.getcwd []", []),
    ("a.yaml", "- prompt: x\n  target: y\n  kind: add\n", ["entry 1", "kind", "'erase'"]),
    ("a.yaml", "- prompt: x\n  target: a\x01b\n", ["not YAML", "character"]),
    ("a.yaml", "- &a [*a]\n", ["entry 1", "expected an object"]),
    ("a.yml", "prompt: x\ntarget: y\nsubject: z\n", ["entry 1", "'z' is not in the prompt"]),
]


@pytest.mark.parametrize(
    ("name", "content", "said"), BROKEN, ids=[f"{row[0]}-{i}" for i, row in enumerate(BROKEN)]
)
def test_broken_files_name_the_place(name: str, content: str, said: list[str], write: Write):
    """Whatever is wrong in a file is one line with the file, the line or entry, and the reason."""
    message = refusal(write(name, content))
    assert all(part in message for part in said), message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("second", "said"),
    [("Lyon", "answers that exclude each other (Rome, Lyon)"), ("Rome", "the same answer")],
)
def test_requests_that_come_twice_are_pointed_out(tmp_path, caplog, second, said):
    """The same prompt with another answer, or with the same one, is told in one line."""
    line = '{"prompt": "The capital of France is", "target": "%s"}\n'
    (tmp_path / "two.jsonl").write_text(line % "Rome" + line % second)
    assert len(read_requests(tmp_path / "two.jsonl")) == 2
    (record,) = caplog.records
    assert "'The capital of France is' comes 2 times, with " + said in record.getMessage()
