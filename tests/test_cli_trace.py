"""`knowpatch locate trace` and `locate attribute`, as a shell sees them."""

from __future__ import annotations

import json

import pytest
import samples
import shell
import tiny

PROMPT = ("The capital of France is", "--subject", "France")
SHORT = ("--samples", "2", "--window", "2", "--noise", "9")


@pytest.fixture
def facts(tmp_path):
    """A file of facts that the tiny model knows, but for one."""
    subjects = ("France", "Japan", "Italy", "Egypt")
    items = [
        {"prompt": prompt, "subject": subject, "answer": tiny.FACTS[prompt], "id": subject}
        for prompt, subject in zip(tiny.FACTS, subjects, strict=False)
    ]
    items.append({"prompt": "The Nile flows through", "subject": "Nile", "answer": "Tokyo"})
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(items))
    return path


@pytest.mark.parametrize("verb", ["trace", "attribute"])
def test_one_prompt_as_a_table_and_a_picture(folder, tmp_path, verb):
    """Each token with its layers; a PNG by the ending of its name."""
    found = shell.run(
        "locate", verb, *PROMPT, *SHORT, "--model", folder, "--out", "map.png", cwd=tmp_path
    )
    assert found.code == 0
    for word in ("'Paris'", "with noise on the subject", "France*", "layers 0 to 3", "map.png"):
        assert word in found.out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_one_prompt_as_json(folder, tmp_path):
    """All that the map was made with, and every draw; a picture besides."""
    command = ("locate", "trace", *PROMPT, *SHORT, "--kind", "mlp", "--seed", "3")
    found = shell.run(*command, "--model", folder, "--json", "--out", "a.svg", cwd=tmp_path)
    told = found.json()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert told["kind"] == "mlp"
    assert told["window"] == 2
    assert told["noise"]["seed"] == 3
    assert told["noise"]["draws"] == 2
    assert len(told["fingerprint"]) == 64
    assert told["form"] == "float32"
    tokens, layers = len(told["tokens"]), 4
    assert [len(told["effects"]), len(told["effects"][0])] == [tokens, layers]
    assert len(told["effects_per_draw"][0][0]) == 2
    assert told["high"] > told["low"]
    again = shell.run(*command, "--model", folder, "--json", cwd=tmp_path)
    assert again.json() == told


def test_bfloat16_gives_the_same_map(folder, tmp_path):
    """The option reaches the passes, and the numbers are near."""
    command = ("locate", "trace", *PROMPT, *SHORT, "--json", "--model", folder)
    fine = shell.run(*command, cwd=tmp_path).json()
    coarse = shell.run(*command, "--dtype", "bfloat16", cwd=tmp_path).json()
    assert coarse["form"] == "bfloat16"
    assert coarse["effects"] != fine["effects"]
    gaps = [
        abs(a - b)
        for one, two in zip(fine["effects"], coarse["effects"], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert max(gaps) < 0.1


@pytest.mark.parametrize("kind", ["state", "severed"])
def test_many_facts(folder, facts, tmp_path, kind):
    """Averages with intervals, rows in a file, and a picture; known facts only."""
    command = ("locate", "trace", "--from", facts, "--kind", kind, *SHORT, "--model", folder)
    found = shell.run(*command, "--out", "all.png", "--rows", "rows.jsonl", cwd=tmp_path)
    assert found.code == 0, found.err
    assert "5 asked, 4 known" in found.out
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["noise"]["draws"] == 2
    assert sorted(line["id"] for line in lines[1:]) == ["Egypt", "France", "Italy", "Japan"]
    told = shell.run(*command, "--json", cwd=tmp_path).json()
    assert (told["asked"], told["known"]) == (5, 4)
    parts = told["roles"]["last subject token"] if kind == "state" else told["severed"]["mlp"]
    assert len(parts["mean"]) == len(parts["low"]) == 4
    assert parts["n"] == told["facts"]
    assert told["total_effect"]["low"] < told["total_effect"]["mean"] < told["total_effect"]["high"]


def test_severed_curves_of_one_prompt(folder, tmp_path):
    """Three curves, as a table, as JSON, as a picture."""
    command = ("locate", "trace", *PROMPT, *SHORT, "--kind", "severed", "--model", folder)
    found = shell.run(*command, "--out", "cut.svg", cwd=tmp_path)
    assert "nothing" in found.out
    assert (tmp_path / "cut.svg").exists()
    told = shell.run(*command, "--json", cwd=tmp_path).json()
    assert {name: len(curve) for name, curve in told["effects"].items()} == {
        "nothing": 4,
        "mlp": 4,
        "attn": 4,
    }


def test_attribution_beside_exact_tracing(folder, facts, tmp_path):
    """The rank correlation, of one prompt and over facts with its interval."""
    one = ("locate", "attribute", *PROMPT, *SHORT, "--exact", "--model", folder)
    assert "rank correlation with exact tracing: " in shell.run(*one, cwd=tmp_path).out
    assert -1 <= shell.run(*one, "--json", cwd=tmp_path).json()["correlation"] <= 1
    many = ("locate", "attribute", "--from", facts, "--limit", "3", "--exact", *SHORT)
    told = shell.run(*many, "--points", "2", "--model", folder, "--json", cwd=tmp_path).json()
    assert told["facts"] == 3
    assert told["points"] == 2
    found = told["rank correlation with exact tracing"]
    assert found["n"] == 3
    assert found["low"] <= found["mean"] <= found["high"]


def test_facts_of_a_dataset(folder, tmp_path):
    """By its name, below a data folder; what the model does not know is said in one line."""
    samples.place(tmp_path / "data", "known_facts", samples.CONTENTS["known_facts"])
    found = shell.run(
        "locate",
        "trace",
        "--from",
        "known_facts",
        "--data",
        "data",
        "--model",
        folder,
        cwd=tmp_path,
    )
    assert found.code == 2
    assert "of 1 facts the model knows 0" in found.complaints[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("The capital of France is",), "no subject given"),
        (("--subject", "France"), "no prompt given"),
        (
            ("The capital of France is", "--subject", "Italy"),
            "subject 'Italy' is not in the prompt",
        ),
        ((*PROMPT, "--kind", "states"), "unknown kind 'states': did you mean 'state'?"),
        ((*PROMPT, "--out", "map.gif"), "map.gif: a picture's name ends in .png or .svg"),
        ((*PROMPT, "--out", "none/map.png"), "no such folder"),
        ((*PROMPT, "--rows", "rows.jsonl"), "--rows is for the maps of many facts"),
        ((*PROMPT, "--from", "facts.json"), "give either PROMPT --subject S, or --from FILE"),
        (("--from", "none.json"), "none.json: no such file"),
        ((*PROMPT, "--samples", "0"), "samples"),
    ],
)
@pytest.mark.parametrize("verb", ["trace", "attribute"])
def test_what_is_refused(tmp_path, verb, arguments, said):
    """In one line, before a model is loaded."""
    assert said in shell.refuse("locate", verb, *arguments, cwd=tmp_path)


def test_severed_is_of_exact_tracing_only(tmp_path):
    """An estimate has no such kind."""
    line = shell.refuse("locate", "attribute", *PROMPT, "--kind", "severed", cwd=tmp_path)
    assert "unknown kind 'severed'" in line
