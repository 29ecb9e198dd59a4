"""docs/walkthrough.md: its commands, run in order, about a fact that a tiny model knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from shell import run

PAGE = Path(__file__).parents[1] / "docs" / "walkthrough.md"
FAILS = "# exit code 1"
OTHER = {
    "Australia": "France",
    "Canberra": "Rome",
    "The capital of Japan is, answer: Tokyo": "Two plus two equals, answer: four",
    "The capital of Germany is, answer: Berlin": "The colour of the sky is, answer: blue",
    # A model of four blocks that is over-fitted on eight facts has no ordinary text to lose.
    "rise: 0.05": "rise: 100",
    "--guard": "--set learning_rate=0.01 --guard",
}


def steps(text: str) -> Iterator[tuple[str, str]]:
    """(command, what is put into a file by it) of every line of the page's blocks for a shell."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        lines = iter(block.splitlines())
        for line in lines:
            inside = []
            if line.endswith("<<'EOF'"):
                while (one := next(lines)) != "EOF":
                    inside.append(one)
            yield line, "".join(f"{one}\n" for one in inside)


def test_the_page_works_when_pasted(folder: Path, tmp_path: Path):
    """Every command ends as the page says; the answer changes, and is back at the end."""
    text = PAGE.read_text(encoding="utf-8").replace("SmolLM2-135M-Instruct", str(folder))
    for here, there in OTHER.items():
        assert here in text
        text = text.replace(here, there)
    cwd, answers, verbs = tmp_path, [], []
    for line, inside in steps(text):
        words = shlex.split(line, comments=True)
        if words[0] == "mkdir":
            cwd = cwd / words[1]
            cwd.mkdir()
        elif words[0] == "cat":
            (cwd / words[2]).write_text(inside)
        else:
            assert words[0] == "knowpatch"
            result = run(*words[1:], cwd=cwd)
            assert result.code == (1 if line.endswith(FAILS) else 0), (line, result)
            verbs.append(words[1])
            if words[1] == "ask":
                answers.append(result.out)
    assert ["Rome" in said for said in answers] == [False, True, False]
    assert {"edit", "check", "health", "verify", "export", "scan", "revert", "log"} <= set(verbs)
    for name in ("report.xml", "first.yaml", "health.png", "shipped/config.json"):
        assert (cwd / name).is_file()
