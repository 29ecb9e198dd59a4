"""`knowpatch prepare`: what edits need is made once, and what was kept is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import transformers as hf
from shell import Result, files, refuse, run

SLOW = '''
"""Slow: needs statistics of two blocks, and edits nothing."""

from pydantic import Field

from knowpatch.method import EditMethod, MethodConfig, register
from knowpatch.parts import moments


class SlowConfig(MethodConfig):
    """Options of Slow."""

    text: str | None = Field(None, description="where text comes from")
    tokens: int = Field(300, description="how much of it")


@register("slow")
class Slow(EditMethod):
    """Prepares."""

    name = "slow"
    family = "intrinsic"
    paper = "none"
    summary = "prepares"
    choose = "never"
    roles = ("mlp.out",)
    Config = SlowConfig

    def _given(self):
        return {"text": self.config.text, "tokens": self.config.tokens, "seed": self.seed}

    def prepare(self, view):
        return moments.key_moments(
            view, "mlp.out", [0, 2], **self._given(), progress=self.progress
        )

    def preparations(self, shape):
        return moments.preparations(shape, "mlp.out", [0, 2], **self._given())

    def edit(self, view, requests, prepared, state):
        raise NotImplementedError
'''
WORDS = "\n\n".join(f"{prompt} {answer}." for prompt, answer in tiny.FACTS.items())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, a cache of its own, and a method that has something to prepare."""
    cwd, plugins = tmp_path / "cwd", tmp_path / "plugins"
    cwd.mkdir()
    plugins.mkdir()
    (plugins / "slow.py").write_text(SLOW, encoding="utf-8")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(plugins))
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "cache"))
    (cwd / "facts.txt").write_text(WORDS)
    return cwd


def prepare(folder: Path, place: Path, *more: str) -> Result:
    return run("prepare", "--method", "slow", "--model", folder, *more, cwd=place)


def test_it_is_made_once(folder: Path, place: Path) -> None:
    """The first run makes both items, the second finds them; sizes are those of the files."""
    first = prepare(folder, place, "--json")
    again = prepare(folder, place, "--json")
    assert (first.code, again.code) == (0, 0)
    for told, there in ((first.json(), False), (again.json(), True)):
        assert (told["method"], told["model"]) == ("slow", folder.name)
        assert set(told["seconds"]) == {"load", "prepare"}
        assert len(told["items"]) == 2
        for item in told["items"]:
            assert set(item) == {"what", "path", "tokens", "there", "bytes", "seconds"}
            assert item["there"] is there
            assert item["bytes"] == Path(item["path"]).stat().st_size > 0
            assert (item["seconds"] is None) is there
    spent = sum(item["seconds"] for item in first.json()["items"])
    assert 0 <= spent <= first.json()["seconds"]["prepare"] + 0.1
    assert again.json()["estimated_seconds"] <= first.json()["estimated_seconds"]


def test_only_what_is_missing_is_made(folder: Path, place: Path) -> None:
    """An item that went away, or is damaged, is made again; the other one was there."""
    items = prepare(folder, place, "--json").json()["items"]
    content = Path(items[1]["path"]).read_bytes()
    Path(items[1]["path"]).unlink()
    found = prepare(folder, place, "--json").json()["items"]
    assert [item["there"] for item in found] == [True, False]
    assert Path(items[1]["path"]).read_bytes() == content
    Path(items[0]["path"]).write_bytes(b"damaged")
    found = prepare(folder, place, "--json").json()["items"]
    assert [item["there"] for item in found] == [False, True]


def test_what_a_person_reads(folder: Path, place: Path) -> None:
    """The estimate first, then what was kept; progress is on stderr."""
    result = prepare(folder, place)
    assert result.code == 0
    before, _, after = result.out.partition("kept")
    assert "slow on tiny-llama" in before
    assert "to make    key statistics of block 0 (" in before
    assert "after loading" in before
    assert "made in" in after
    assert ".safetensors" in after
    assert "collecting key statistics" in result.err
    again = prepare(folder, place)
    assert "there      key statistics of block 0" in again.out
    assert again.out.count("was there") == 2


@pytest.mark.parametrize("way", [("--text", "facts.txt"), ("--set", "text=facts.txt")])
def test_the_text_that_was_named(folder: Path, place: Path, way: tuple[str, str]) -> None:
    """--text is the option `text`: by either way the same files are made, others than without."""
    plain = prepare(folder, place, "--json", "--set", "tokens=40").json()["items"]
    told = prepare(folder, place, "--json", "--set", "tokens=40", *way).json()["items"]
    assert "facts.txt" in told[0]["what"]
    assert not told[0]["there"]
    assert {item["path"] for item in plain}.isdisjoint(item["path"] for item in told)
    other = ("--text", str(place / "facts.txt"))
    again = prepare(folder, place, "--json", "--set", "tokens=40", *other).json()["items"]
    assert all(item["there"] for item in again)
    assert [item["path"] for item in again] == [item["path"] for item in told]


def test_a_seed_is_an_item_of_its_own(folder: Path, place: Path) -> None:
    """Another seed takes other text, so it is another file."""
    first = prepare(folder, place, "--json").json()["items"]
    other = prepare(folder, place, "--json", "--seed", "1").json()["items"]
    assert not other[0]["there"]
    assert other[0]["path"] != first[0]["path"]


# -- dry run ---------------------------------------------------------------------------------------


def test_a_dry_run_does_nothing(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads no model and writes nothing, and says what there is to do, and about how long."""
    before = files(place.parent)
    with monkeypatch.context() as patched:
        patched.setattr(hf.AutoModelForCausalLM, "from_pretrained", _not_now)
        result = prepare(folder, place, "--dry-run")
        told = prepare(folder, place, "--dry-run", "--json").json()
    assert result.code == 0
    assert result.out.count("to make") == 2
    assert "nothing was loaded or written" in result.out
    assert files(place.parent) == before
    assert told["estimated_seconds"] >= 0
    assert [item["there"] for item in told["items"]] == [False, False]
    assert [item["bytes"] for item in told["items"]] == [None, None]
    prepare(folder, place)
    told = prepare(folder, place, "--dry-run", "--json").json()
    assert [item["there"] for item in told["items"]] == [True, True]
    assert told["items"][0]["bytes"] > 0


def _not_now(*arguments: object, **options: object) -> None:
    raise AssertionError("a dry run does not do this")


def test_a_model_that_is_not_here_yet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a hub model a dry run tells of the download; what else there is is not known yet."""
    import huggingface_hub

    class File:
        rfilename, size = "model.safetensors", 3_000_000_000

    class Hub:
        def model_info(self, name: str, *, files_metadata: bool) -> object:
            return type("Info", (), {"siblings": [File()]})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _not_now)
    result = prepare(Path("someone/some-model"), place, "--dry-run")
    assert result.code == 0
    assert "3.0 GB" in result.out
    assert "not known yet" in result.out


# -- nothing to do, and refusals -------------------------------------------------------------------


def test_nothing_to_prepare(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without preparations says so, and no model is loaded for it."""
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", _not_now)
    asked = ("prepare", "--method", "ft", "--model", folder)
    result = run(*asked, cwd=place)
    assert result.code == 0
    assert "nothing to prepare" in result.out
    assert run(*asked, "--json", cwd=place).json()["items"] == []


def test_refusals_are_one_line(folder: Path, place: Path) -> None:
    """An unknown method, option, model or text; and a text for a method that takes none."""
    model = ("--model", folder)
    slow = ("prepare", "--method", "slow", *model)
    assert "unknown method" in refuse("prepare", "--method", "slwo", *model, cwd=place)
    assert "'tokesn'" in refuse(*slow, "--set", "tokesn=3", cwd=place)
    assert "'text' of ice" in refuse(
        "prepare", "--method", "ice", "--text", "facts.txt", *model, cwd=place
    )
    for more in ((), ("--dry-run",)):
        line = refuse(*slow, "--text", "none.txt", *more, cwd=place)
        assert "none.txt: no such file" in line
    assert "no such model" in refuse("prepare", "--model", "./none", cwd=place)


def test_a_model_that_the_method_cannot_edit(place: Path, tmp_path: Path) -> None:
    """A mixture of experts is refused with the reason."""
    path = tmp_path / "mixture"
    for part in tiny.fresh("mixtral"):
        part.save_pretrained(path)
    line = refuse("prepare", "--method", "slow", "--model", path, "--json", cwd=place)
    assert "mixture of 4 experts" in line


def test_what_cannot_be_is_said_before_the_model_is_loaded(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that the model does not have, and a text that is empty, are refused by a dry run."""
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", _not_now)
    (place / "empty.txt").write_text(" \n")
    asked = ("prepare", "--method", "memit", "--model", folder, "--dry-run")
    line = refuse(*asked, "--set", "layers=2-40", cwd=place)
    assert "layer 4 does not exist: the model has layers 0 to 3" in line
    assert "empty.txt: is empty" in refuse(*asked, "--text", "empty.txt", cwd=place)
    fact = ("edit", "A is", "--subject", "A", "--target", "b", "--dry-run", "--model", folder)
    for method, option in (("ft", "layer=4"), ("grace", "layer=4"), ("ultraedit", "out=3-4")):
        assert "does not exist" in refuse(*fact, "--method", method, "--set", option, cwd=place)
