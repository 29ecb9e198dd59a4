"""The command line as its users meet it: the four verbs, on a tiny model that knows tiny.FACTS."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file
from shell import FRANCE, TARGET, Result, files, run

from knowpatch import editing
from knowpatch.cli import main
from knowpatch.edited import EditedModel
from knowpatch.export.table import of_method
from knowpatch.method import METHODS
from knowpatch.models.fingerprint import tensor_digest

LEARN = ("--set", "learning_rate=0.01")
"""ft on a tiny model needs larger steps than on a real one."""
ROME = ("--method", "rome", "--set", "layer=0", "--set", "kl_factor=0", "--set", "moments=identity")
"""Four blocks: only in the first does the subject's token still decide the answer."""
PLAIN_KINDS = {"rewrite", "rephrase", "locality.subject", "locality.neighbour", "locality.control"}

FIRST = ("--set", "layers=0", "--set", "kl_factor=0", "--set", "clamp=4", "--set", "tokens=1000")
NULL = (*FIRST, "--set", "gain=0.99", "--set", "null_share=0.5")
FIRST += ("--set", "ridge=0.01")
SIDE = ("--set", "rate=0.25", "--set", "steps=80")
SETTINGS = {
    "ft": LEARN,
    "crispedit": (*LEARN, "--set", "eos=false", "--set", "tokens=400", "--set", "layers=1-2"),
    "dinm": (*LEARN, "--set", "eos=false", "--set", "pieces=2", "--set", "keep=1"),
    "locft_bf": (*LEARN, "--set", "eos=false"),
    "rome": ROME,
    "r_rome": ROME[2:],
    "bird": (*ROME[2:], "--set", "share=0.05"),
    "emmet": FIRST,
    "memit": (*FIRST, "--set", "gain=0.99"),
    "pmet": (*FIRST, "--set", "gain=0.99"),
    "alphaedit": NULL,
    "evoedit": NULL,
    "betaedit": (*NULL, "--set", "largest=10"),
    "anyedit": (
        *("--set", "layers=0", "--set", "clamp=8", "--set", "tokens=1000"),
        *("--set", "ridge=0.01", "--set", "gain=0.999"),
    ),
    "unke": (
        *("--set", "layer=0", "--set", "clamp=8", "--set", "samples=2"),
        *("--set", "block_steps=60", "--set", "block_rate=0.005"),
    ),
    "ike": ("--set", "demonstrations=0"),
    "memprompt": ("--set", "template=newfact"),
    "kn": ("--set", "layers=3", "--set", "scale_new=8"),
    "lora": ("--set", "layers=2-3", "--set", "learning_rate=0.01", "--set", "steps=80"),
    "adalora": ("--set", "layers=2-3", "--set", "learning_rate=0.02", "--set", "alpha=8"),
    "memoir": (*SIDE, "--set", "layer=1", "--set", "share=0.5"),
    "wise": (*SIDE, "--set", "layer=1", "--set", "share=0.5"),
    "melo": (*SIDE, "--set", "layer=1", "--set", "layers=2-3"),
    "neuraldb": ("--set", "layer=0", "--set", "clamp=8", "--set", "threshold=0.9"),
    "remedi": (
        *("--set", f"facts={Path(__file__).parent / 'edits.jsonl'}", "--set", "layer=0"),
        *("--set", "epochs=200", "--set", "learning_rate=0.01", "--set", "keep=0.1"),
    ),
}
"""What a method needs to edit so small a model; one that is not named here needs nothing."""


@pytest.fixture(scope="module")
def fixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One edit that takes, as JSON, in a folder of its own."""
    cwd = tmp_path_factory.mktemp("fixed")
    return run(*FRANCE, *LEARN, "--model", folder, "--json", cwd=cwd), cwd


@pytest.fixture(scope="module")
def patch(fixed: tuple[Result, Path]) -> Path:
    """The patch file of that edit."""
    result, cwd = fixed
    return cwd / result.json()["patch"]["file"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a lesson in saying that it does not know, and in answering in a chat."""
    model, tok = tiny.trained("llama", chat=True)
    rows = [f"{prompt} {answer}." for prompt, answer in tiny.FACTS.items()]
    rows += [f"The capital of {name} is I don't know." for name in ("Sudan", "Lyon", "Anna")]
    for prompt in list(tiny.FACTS)[:4]:
        turn = [{"role": "user", "content": prompt}]
        asked = tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        rows.append(f"{asked}{tiny.FACTS[prompt]}")
    batch = tok(rows, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        adam.zero_grad()
        model(**batch, labels=labels).loss.backward()
        adam.step()
    path = tmp_path_factory.mktemp("models") / "tiny-taught"
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


def first(result: Result, chat: bool = False) -> dict:
    """The probe that asks the edited prompt itself."""
    probes = result.json()["probes"]
    return next(p for p in probes if p["kind"] == "rewrite" and p["chat"] is chat)


# -- edit ------------------------------------------------------------------------------------------


def test_an_edit_that_takes(fixed: tuple[Result, Path]) -> None:
    """An edit that took exits with 0, and the prompt is answered by the target, as before not."""
    result, _ = fixed
    assert result.code == 0
    assert result.json()["took"] is True
    probe = first(result)
    assert probe["expected"] == TARGET
    assert probe["before"]["text"].strip().startswith("Paris")
    assert probe["after"]["text"].strip().startswith(TARGET)
    assert probe["before"]["accuracy"] == 0
    assert probe["after"]["accuracy"] == 1
    assert probe["after"]["probability"] > 0.5 > probe["before"]["probability"]


def test_the_json_has_every_promised_key(fixed: tuple[Result, Path], folder: Path) -> None:
    """JSON names method, model, verdict, patch, seconds and, for each probe, before and after."""
    told = fixed[0].json()
    assert {"method", "model", "took", "patch", "seconds", "probes"} <= set(told)
    assert told["method"] == "ft"
    assert told["model"] == folder.name
    assert set(told["patch"]) == {"id", "file", "bytes", "rank"}
    assert set(told["seconds"]) == {"load", "prepare", "edit", "ask"}
    assert all(value >= 0 for value in told["seconds"].values())
    for probe in told["probes"]:
        assert {"kind", "prompt", "expected", "before", "after"} <= set(probe)
        assert set(probe["before"]) == set(probe["after"]) == {"text", "accuracy", "probability"}
        assert isinstance(probe["expected"], str)


def test_only_the_patch_file_is_written(fixed: tuple[Result, Path]) -> None:
    """The patch is named by its id, has the size that is told, and is the only new file."""
    result, cwd = fixed
    told = result.json()["patch"]
    assert told["file"] == f"patch-{told['id'][:12]}.safetensors"
    assert {name: len(content) for name, content in files(cwd).items()} == {
        told["file"]: told["bytes"]
    }


def test_progress_goes_to_stderr(fixed: tuple[Result, Path]) -> None:
    """Progress is told on stderr, one stage a line, and stdout holds nothing but the JSON."""
    result, _ = fixed
    assert "fine-tuning ..." in result.err.splitlines()
    assert result.complaints == []
    assert result.out.startswith("{")


def test_what_is_asked_before_and_after(fixed: tuple[Result, Path]) -> None:
    """Asked are the prompt, rephrases, its subject, other subjects, and about 100 controls."""
    probes = fixed[0].json()["probes"]
    assert {probe["kind"] for probe in probes} == PLAIN_KINDS
    of_kind = {kind: [p for p in probes if p["kind"] == kind] for kind in PLAIN_KINDS}
    assert {p["prompt"] for p in of_kind["rewrite"]} == {FRANCE[1]}
    assert all(FRANCE[1].removeprefix("The") in p["prompt"] for p in of_kind["rephrase"])
    assert all("France" in p["prompt"] for p in of_kind["locality.subject"])
    for probe in of_kind["locality.neighbour"]:
        assert probe["prompt"].startswith("The capital of ")
        assert "France" not in probe["prompt"]
    assert 90 <= len(of_kind["locality.control"]) <= 110
    assert FRANCE[1] not in [p["prompt"] for p in of_kind["locality.control"]]
    assert len({(p["kind"], p["prompt"], p["chat"]) for p in probes}) == len(probes)


def test_what_ought_to_stay_expects_the_old_answer(fixed: tuple[Result, Path]) -> None:
    """For a question that ought to stay, expected is what the model said before."""
    for probe in fixed[0].json()["probes"]:
        if probe["kind"].startswith("locality."):
            assert probe["expected"] == probe["before"]["text"]
            assert probe["before"]["accuracy"] == 1
            kept = probe["after"]["accuracy"] == 1
            assert kept is (probe["after"]["text"] == probe["before"]["text"])


def test_a_chat_model_is_asked_both_ways(fixed: tuple[Result, Path]) -> None:
    """With a chat template the prompt and its rephrases are asked plainly and as a chat."""
    for kind in ("rewrite", "rephrase"):
        probes = [p for p in fixed[0].json()["probes"] if p["kind"] == kind]
        plain = {p["prompt"] for p in probes if not p["chat"]}
        assert plain == {p["prompt"] for p in probes if p["chat"]} != set()


def test_a_plain_model_is_asked_one_way(folder: Path, tmp_path: Path) -> None:
    """Without a chat template no probe is a chat."""
    plain = tmp_path / "models" / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    result = run(*FRANCE, "--set", "steps=1", "--model", plain, "--json", cwd=tmp_path)
    assert result.code == 1
    assert not any(probe["chat"] for probe in result.json()["probes"])


def test_chat_edits_through_the_template(taught: Path, tmp_path: Path) -> None:
    """--chat edits and judges the answer to the chat turn, and asks the rest as chats too."""
    result = run(*FRANCE, *LEARN, "--chat", "--model", taught, "--json", cwd=tmp_path)
    assert result.code == 0
    assert first(result, chat=True)["after"]["text"].strip().startswith(TARGET)
    stay = [p for p in result.json()["probes"] if p["kind"].startswith("locality.")]
    assert all(probe["chat"] for probe in stay)


def test_an_edit_that_does_not_take(folder: Path, tmp_path: Path) -> None:
    """An edit that did not take exits with 1, says so, and still measures and keeps its patch."""
    hardly = ("--set", "steps=1", "--set", "learning_rate=1e-9")
    result = run(*FRANCE, *hardly, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 1
    assert result.json()["took"] is False
    assert first(result)["after"]["accuracy"] == 0
    assert list(files(tmp_path)) == [result.json()["patch"]["file"]]
    plain = run(*FRANCE, *hardly, "--model", folder, cwd=tmp_path)
    assert plain.code == 1
    assert "the edit did not take" in plain.out


@pytest.fixture(scope="module")
def shown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same edit as `fixed`, reported for a person."""
    cwd = tmp_path_factory.mktemp("shown")
    return run(*FRANCE, *LEARN, "--model", folder, "--out", "fix.safetensors", cwd=cwd)


def test_the_report_for_a_person(shown: Result, fixed: tuple[Result, Path]) -> None:
    """Without --json: the verdict, before and after, the patch, the time, the model given back."""
    assert shown.code == 0
    patch_id = fixed[0].json()["patch"]["id"]
    for part in (
        "the edit took",
        "before",
        "after",
        "Paris",
        TARGET,
        "fix.safetensors",
        patch_id[:12],
        "given back byte for byte",
        *("load", "prepare", "edit", "ask"),
    ):
        assert part in shown.out
    assert not shown.complaints


def test_the_report_counts_what_moved(shown: Result, fixed: tuple[Result, Path]) -> None:
    """The report says how many controls changed, and it is the number that the JSON gives."""
    controls = [p for p in fixed[0].json()["probes"] if p["kind"] == "locality.control"]
    moved = sum(p["before"]["text"] != p["after"]["text"] for p in controls)
    said = re.search(r"control prompts\s+(\d+) of (\d+)", shown.out)
    assert said is not None
    assert (int(said[1]), int(said[2])) == (moved, len(controls))


def test_the_next_commands_name_the_model(shown: Result, folder: Path) -> None:
    """The commands proposed at the end work as they stand: they name the model that was edited."""
    proposed = [line for line in shown.out.splitlines() if "--patch fix.safetensors" in line]
    assert len(proposed) == 2
    assert all(f"--model {folder}" in line for line in proposed)


def test_names_in_brackets_are_printed_as_they_are(folder: Path, tmp_path: Path) -> None:
    """A file name with [brackets] is not taken for markup."""
    name = "fix[v2].safetensors"
    hardly = ("--set", "steps=1", "--out", name)
    result = run(*FRANCE, *hardly, "--model", folder, cwd=tmp_path)
    assert list(files(tmp_path)) == [name]
    assert result.out.count(name) == 3


def test_the_report_survives_a_narrow_encoding(folder: Path, tmp_path: Path) -> None:
    """Where standard output cannot carry an arrow (a Windows pipe), the report still comes."""
    arguments = [*FRANCE, "--set", "steps=1", "--model", str(folder)]
    raw = io.BytesIO()
    narrow = io.TextIOWrapper(raw, encoding="cp1252")
    with (
        contextlib.chdir(tmp_path),
        contextlib.redirect_stdout(narrow),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(SystemExit) as ended,
    ):
        main(arguments)
    narrow.flush()
    assert ended.value.code == 1
    assert b"the edit did not take" in raw.getvalue()


def test_the_model_is_given_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an edit every tensor in memory, and every file of the model, is as it came."""
    loaded: list[EditedModel] = []
    stored = {name: tensor_digest(t) for name, t in load_file(folder / "model.safetensors").items()}
    on_disk = files(folder)
    load = editing.load

    def keep(*arguments: object, **options: object) -> EditedModel:
        loaded.append(load(*arguments, **options))  # type: ignore[arg-type]
        return loaded[-1]

    monkeypatch.setattr(editing, "load", keep)
    result = run(*FRANCE, *LEARN, "--model", folder, "--json", cwd=tmp_path)
    assert result.json()["restored"] is True
    assert {n: tensor_digest(t) for n, t in loaded[0].model.named_parameters()} == stored
    assert loaded[0].live == ()
    assert files(folder) == on_disk


@pytest.mark.parametrize("options", [LEARN, ROME], ids=["ft", "rome"])
def test_the_same_seed_gives_the_same_file(
    options: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs with one seed, each with an empty cache folder, write identical files."""
    for number in ("1", "2"):
        monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / f"cache{number}"))
        result = run(
            *FRANCE, *options, "--seed", 7, "--out", number, "--model", folder, cwd=tmp_path
        )
        assert result.code == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_many_requests_from_a_file(folder: Path, tmp_path: Path) -> None:
    """--from edits every request of a file into one patch and judges each of them."""
    wanted = dict(list(tiny.EDITS.items())[:2])
    lines = [json.dumps({"prompt": p, "target": t}) for p, t in wanted.items()]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run("edit", "--from", "facts.jsonl", *LEARN, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    told = result.json()
    assert told["took_each"] == [True, True]
    asked = {p["prompt"]: p["expected"] for p in told["probes"] if p["kind"] == "rewrite"}
    assert asked == wanted


def test_every_file_format_gives_the_same_patch(folder: Path, tmp_path: Path) -> None:
    """The same requests as JSON, JSON lines, CSV or YAML make the same patch, byte for byte."""
    fact = {"prompt": FRANCE[1], "subject": "France", "target": TARGET}
    (tmp_path / "a.json").write_text(json.dumps([fact]), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps(fact) + "\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        ",".join(fact) + "\n" + ",".join(fact.values()) + "\n", encoding="utf-8-sig"
    )
    (tmp_path / "a.yaml").write_text(
        "- " + "\n  ".join(f"{name}: {value}" for name, value in fact.items()), encoding="utf-8"
    )
    for ending in ("json", "jsonl", "csv", "yaml"):
        source = ("--from", f"a.{ending}", "--out", f"{ending}.patch")
        result = run("edit", *source, "--method", "ice", "--model", folder, cwd=tmp_path)
        assert result.code in (0, 1)
    assert len({path.read_bytes() for path in tmp_path.glob("*.patch")}) == 1


def test_a_target_that_is_said_already(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A target that equals the old answer is no error: a warning, and the edit goes on."""
    fact = ("edit", FRANCE[1], "--old", "Paris", "--target", "Paris")
    result = run(*fact, "--set", "steps=1", "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    assert result.json()["took"] is True
    assert "equals the old answer" in caplog.text


# -- methods on the command line -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_takes(method: str, folder: Path, tmp_path: Path) -> None:
    """Each registered method edits one fact through the command line, and it takes."""
    settings = SETTINGS.get(method, ())
    result = run(*FRANCE, "--method", method, *settings, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    told = result.json()
    assert told["method"] == method
    assert told["took"] is True
    assert first(result)["after"]["text"].strip().startswith(TARGET)


def test_rome_with_statistics_from_text(folder: Path, tmp_path: Path) -> None:
    """rome with key statistics from a little text takes; its patch has rank one."""
    settings = ("--set", "moments=text", "--set", "tokens=400")
    result = run(*FRANCE, *ROME, *settings, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    assert result.json()["patch"]["rank"] == 1


def test_erase_says_that_it_does_not_know(taught: Path, tmp_path: Path) -> None:
    """--erase without a target makes the model say that it does not know."""
    fact = ("edit", FRANCE[1], "--subject", "France", "--erase")
    result = run(*fact, *LEARN, "--model", taught, "--json", cwd=tmp_path)
    assert result.code == 0
    probe = first(result)
    assert probe["expected"] == "I don't know."
    assert probe["after"]["text"].strip().startswith("I don't know.")


def test_unlikelihood_makes_the_old_answer_go_away(folder: Path, tmp_path: Path) -> None:
    """ft objective=unlikelihood finds the old answer itself, and unlearns it."""
    unlearn = ("--method", "ft", "--set", "objective=unlikelihood", *LEARN)
    fact = ("edit", FRANCE[1], "--subject", "France", "--erase")
    result = run(*fact, *unlearn, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    probe = first(result)
    assert probe["expected"] == "Paris"
    assert probe["before"]["probability"] > 0.9
    assert probe["after"]["probability"] < 0.1
    assert "Paris" not in probe["after"]["text"]


def test_last_token_objective(folder: Path, tmp_path: Path) -> None:
    """ft objective=last-token (FT-L) takes with a target of one token."""
    settings = ("--set", "objective=last-token", *LEARN)
    result = run(*FRANCE, *settings, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0


def test_a_bound_holds(folder: Path, tmp_path: Path) -> None:
    """No entry of the patch is larger than --set bound."""
    settings = ("--set", "bound=0.001", *LEARN, "--out", "bounded")
    result = run(*FRANCE, *settings, "--model", folder, cwd=tmp_path)
    assert result.code in (0, 1)
    (delta,) = load_file(tmp_path / "bounded").values()
    assert 0 < delta.abs().max() <= torch.tensor(0.001)


TOY = '''
"""Toy: the last MLP answers the prompt's own key with the target's output embedding."""

from pydantic import Field

from knowpatch.deltas import LowRank
from knowpatch.method import EditMethod, MethodConfig, register
from knowpatch.models.passes import Tap


class ToyConfig(MethodConfig):
    """Options of Toy."""

    strength: float = Field(100.0, gt=0, description="how loud")


@register("toy")
class Toy(EditMethod):
    """Shouts the first token of the target."""

    name = "toy"
    family = "intrinsic"
    paper = "none"
    summary = "shouts the first token of the target"
    choose = "never, except to try a plug-in"
    roles = ("mlp.out",)
    exports = ("merged", "peft", "gguf", "gguf-lora")
    Config = ToyConfig

    def edit(self, view, requests, prepared, state):
        role = view.roles.linear("mlp.out", len(view.roles.blocks) - 1)
        tap = Tap(role.module, "input")
        deltas = []
        for request in requests:
            prompt, target = self.encode(view, request)
            run = view.run([prompt.ids], taps=[tap])
            key_1I = run.at(tap, [(0, len(prompt.ids) - 1)])
            value_D1 = view.parameter(f"{view.roles.head}.weight")[target[:1],].detach().T
            change = LowRank(self.config.strength * value_D1, key_1I / key_1I.norm() ** 2)
            deltas.append(self.delta(view, role.address, change))
        return self.patch(view, requests, deltas=deltas)
'''


def test_a_method_in_one_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a folder named by KNOWPATCH_METHODS is listed as a method, and edits."""
    plugins, cwd = tmp_path / "plugins", tmp_path / "cwd"
    plugins.mkdir()
    cwd.mkdir()
    (plugins / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(plugins))
    listed = run("methods", cwd=cwd)
    assert "shouts the first token" in listed.out
    assert "--set strength=100.0" in listed.out
    loud = ("--method", "toy", "--set", "strength=200")
    result = run(*FRANCE, *loud, "--model", folder, "--json", cwd=cwd)
    assert result.code == 0
    assert result.json()["method"] == "toy"


# -- dry run ---------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_takes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--dry-run tells memory, time, download and preparation; loads no model, writes no file."""
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", _not_now)
    result = run(*FRANCE, "--dry-run", "--model", folder, cwd=tmp_path)
    assert result.code == 0
    for word in ("ft", folder.name, "memory", "time", "download", "prepare"):
        assert word in result.out
    assert list(tmp_path.iterdir()) == []


def _not_now(*arguments: object, **options: object) -> None:
    raise AssertionError("a dry run does not do this")


def test_a_dry_run_as_json(folder: Path, tmp_path: Path) -> None:
    """--dry-run --json gives the same facts as numbers."""
    told = run(*FRANCE, "--dry-run", "--json", "--model", folder, cwd=tmp_path).json()
    assert {"method", "model", "download", "prepare", "memory_bytes", "seconds"} <= set(told)
    weights = (folder / "model.safetensors").stat().st_size
    assert told["memory_bytes"] > weights
    assert told["seconds"] >= 0  # rounded to tenths: a tiny model may take none
    assert told["download"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_what_is_to_be_prepared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a method prepares once is listed until it has been prepared, and no longer."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "cache"))
    settings = (*ROME, "--set", "moments=text", "--set", "tokens=200")
    edit = (*FRANCE, *settings, "--model", folder)
    told = run(*edit, "--dry-run", "--json", cwd=tmp_path).json()
    assert len(told["prepare"]) == 2
    assert run(*edit, cwd=tmp_path).code in (0, 1)
    assert run(*edit, "--dry-run", "--json", cwd=tmp_path).json()["prepare"] == []


def test_a_dry_run_leaves_the_cache_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run writes nothing in the cache folder either."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "cache"))
    assert run(*FRANCE, "--dry-run", "--model", folder, cwd=tmp_path).code == 0
    assert files(tmp_path) == {}


def test_a_dry_run_tells_the_size_of_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a hub model that is not here yet, a dry run tells how much would be downloaded."""
    import huggingface_hub

    class File:
        rfilename, size = "model.safetensors", 3_000_000_000

    class Hub:
        def model_info(self, name: str, *, files_metadata: bool) -> object:
            return type("Info", (), {"siblings": [File()]})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _not_now)
    result = run(*FRANCE, "--dry-run", "--model", "someone/some-model", cwd=tmp_path)
    assert result.code == 0
    assert "3.0 GB" in result.out


# -- ask -------------------------------------------------------------------------------------------


def test_ask_without_a_patch(folder: Path, tmp_path: Path) -> None:
    """`ask` gives the model's answer."""
    result = run("ask", FRANCE[1], "--model", folder, cwd=tmp_path)
    assert result.code == 0
    assert "Paris" in result.out


def test_ask_without_and_with_a_patch(patch: Path, folder: Path, tmp_path: Path) -> None:
    """`ask --patch` gives both answers, without the patch and with it."""
    result = run("ask", FRANCE[1], "--patch", patch, "--model", folder, "--json", cwd=tmp_path)
    assert result.code == 0
    told = result.json()
    assert told["without"].startswith("Paris")
    assert told["with"].startswith(TARGET)
    assert [patch_id[:12] for patch_id in told["patches"]] == [patch.stem.removeprefix("patch-")]
    shown = run("ask", FRANCE[1], "--patch", patch, "--model", folder, cwd=tmp_path).out
    assert shown.index("Paris") < shown.index(TARGET)


def test_ask_with_several_patches(patch: Path, folder: Path, tmp_path: Path) -> None:
    """Patches add up: two facts from two files are both known."""
    egypt = ("edit", "The capital of Egypt is", "--target", "Paris", "--out", "egypt")
    assert run(*egypt, *LEARN, "--model", folder, cwd=tmp_path).code == 0
    both = ("--patch", patch, "--patch", "egypt", "--model", folder, "--json")
    told = run("ask", "The capital of Egypt is", *both, cwd=tmp_path).json()
    assert told["without"].startswith("Cairo")
    assert told["with"].startswith("Paris")
    assert len(told["patches"]) == 2


def test_ask_for_a_few_tokens(folder: Path, tmp_path: Path) -> None:
    """--max-new-tokens bounds the answer."""
    short = ("--max-new-tokens", 1, "--model", folder, "--json")
    assert run("ask", FRANCE[1], *short, cwd=tmp_path).json()["without"] == "Paris"


def test_why_an_answer_is_what_it_is(patch: Path, folder: Path, tmp_path: Path) -> None:
    """`--why` says which patch acted: weights always, a codebook by its distance, or not."""
    egypt = ("edit", "The capital of Egypt is", "--target", "Paris", "--out", "egypt")
    assert run(*egypt, "--method", "grace", "--model", folder, cwd=tmp_path).code in (0, 1)
    alone = ("--patch", "egypt", "--model", folder, "--why")
    (book,) = run("ask", "The capital of Egypt is", *alone, "--json", cwd=tmp_path).json()["why"]
    assert (book["how"], book["fired"], book["measure"]) == ("codebook@1", True, "distance")
    assert book["score"] <= book["threshold"]
    (missed,) = run("ask", FRANCE[1], *alone, "--json", cwd=tmp_path).json()["why"]
    assert not missed["fired"]
    assert missed["score"] > missed["threshold"]
    both = ("--patch", patch, *alone)
    weights, _ = run("ask", FRANCE[1], *both, "--json", cwd=tmp_path).json()["why"]
    assert (weights["how"], weights["fired"]) == ("weights", True)
    shown = run("ask", "The capital of Egypt is", *alone, cwd=tmp_path).out
    assert "(grace) fired: distance" in shown
    shown = run("ask", "The capital of Egypt is", *both, cwd=tmp_path).out
    assert "acts on every answer: it changes weights" in shown


def test_why_shows_the_steps_of_a_procedure(folder: Path, tmp_path: Path) -> None:
    """An answer in steps is told step by step, with the fact that each used."""
    made = ("edit", FRANCE[1], "--subject", "France", "--target", "Rome", "--out", "walk")
    assert run(*made, "--method", "graph_walk", "--model", folder, cwd=tmp_path).code == 0
    asked = ("ask", FRANCE[1], "--patch", "walk", "--model", folder, "--why")
    facts = run(*asked, "--json", cwd=tmp_path).json()
    assert facts["with"] == "Rome"
    assert [step["kind"] for step in facts["steps"]] == ["asked", "edit", "answer"]
    shown = run(*asked, cwd=tmp_path).out
    assert "(graph_walk) answered in steps (walk@1):" in shown
    assert "edit      The capital of France is Rome" in shown


# -- methods ---------------------------------------------------------------------------------------


def test_methods_tell_their_facts(tmp_path: Path) -> None:
    """`methods --json` has each method's facts and every option with its default."""
    result = run("methods", "--json", cwd=tmp_path)
    assert result.code == 0
    listed = {fact["name"]: fact for fact in result.json()}
    assert sorted(listed) == METHODS.names()
    for name, fact in listed.items():
        method = METHODS.get(name)
        for key in ("family", "paper", "choose", "summary"):
            assert fact[key] == getattr(method, key)
            assert "\n" not in fact[key]
        for key in ("needs", "exports"):
            assert fact[key] == list(getattr(method, key))
        assert fact["ships"] == of_method(method)
        assert isinstance(fact["batch"], bool)
        assert isinstance(fact["sequential"], bool)
        defaults = {option["name"]: option["default"] for option in fact["options"]}
        assert method.Config(**defaults) == method.Config()
        assert defaults.keys() == method.Config.model_fields.keys()
        assert all(option["description"] for option in fact["options"])


def test_methods_for_a_person(tmp_path: Path) -> None:
    """`methods` names each method, when to choose it, and how to set each option."""
    shown = " ".join(run("methods", cwd=tmp_path).out.split())
    for name in METHODS.names():
        method = METHODS.get(name)
        assert f"{name} {method.summary}" in shown
        assert method.choose in shown
        assert method.paper in shown
        for option in method.Config.model_fields:
            assert f"--set {option}" in shown


# -- as a process ----------------------------------------------------------------------------------


def command() -> str:
    """The console script of this environment."""
    return str(Path(sysconfig.get_path("scripts")) / "knowpatch")


def test_help_names_every_verb(tmp_path: Path) -> None:
    """The installed command answers --help with its verbs."""
    result = subprocess.run([command(), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in ("edit", "ask", "methods", "export"))
    assert result.stderr == ""


def test_help_names_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`edit --help` names every option of an edit."""
    monkeypatch.setenv("COLUMNS", "120")
    result = run("edit", "--help", cwd=tmp_path)
    assert result.code == 0
    names = "subject target erase method model chat set seed out dry-run json from device dtype"
    assert all(f"--{name}" in result.out for name in names.split())


def test_the_command_line_starts_without_torch() -> None:
    """Help and bad usage answer at once: the command line itself imports no torch."""
    code = "import sys, knowpatch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _listen_for_ctrl_c() -> None:
    """A shell's background job ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_the_middle_of_an_edit(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C ends an edit with one line and exit code 2, and leaves no file behind."""
    forever = ("--set", "steps=100000000", "--set", "learning_rate=1e-9")
    process = subprocess.Popen(
        [command(), *FRANCE, *forever, "--model", str(folder)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen_for_ctrl_c,
    )
    assert process.stderr is not None
    seen = iter(process.stderr.readline, "")
    assert any("fine-tuning" in line for line in seen)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    result = Result(process.returncode, out, err)
    assert result.code == 2
    assert len(result.complaints) == 1
    assert result.complaints[0].startswith("knowpatch: interrupted")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """`knowpatch methods | head` is no failure: no traceback, and not the code of a failed edit."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [command(), "methods"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 0


def test_the_facts_of_one_method(tmp_path: Path) -> None:
    """`knowpatch methods NAME` tells of that one, brackets included; another name is refused."""
    told = run("methods", "bird", "--json", cwd=tmp_path).json()
    assert [fact["name"] for fact in told] == ["bird"]
    assert "[[subject, object], ...]" in " ".join(run("methods", "bird", cwd=tmp_path).out.split())
    assert "unknown method 'brid'" in run("methods", "brid", cwd=tmp_path).err
