"""Damaged and killed workspaces: no traceback, nothing lost, and what is broken is named."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgers import filled, patch, record
from shell import files, run

from knowpatch.cli import diff, gc, log, show, tag
from knowpatch.errors import KnowpatchError
from knowpatch.ledger import Workspace, blobs
from knowpatch.ledger.copies import repair
from knowpatch.ledger.signing import Signer, make_key
from knowpatch.ledger.store import DATABASE, TEXT
from knowpatch.ledger.verify import verify

SOAK = bool(os.environ.get("KNOWPATCH_SOAK"))
MUTANTS = 2000 if SOAK else 200
KILLS = 160 if SOAK else 18
EDIT_KILLS = 40 if SOAK else 2

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


# -- damaged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with every kind of event and file."""
    root = tmp_path_factory.mktemp("sound")
    workspace = filled(root, 4)
    edits = list(workspace.history.edits.values())
    workspace.move(reverts=[edits[1]])
    workspace.tag("v1", workspace.history.number)
    try:
        signer: Signer | None = make_key(root / "key")
    except Exception:  # without the library there are no signatures to damage
        signer = None
    for edit in edits if signer is not None else ():
        signer.sign(workspace.folder, edit.id, edit.recorded["sha256"])
    record(workspace, patch(9, weights=True))
    assert not verify(workspace.folder).faults
    return root


def flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 1, 4, 40])):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def zeroed(content: bytes, chance: random.Random) -> bytes:
    """A block of a disk that came back empty."""
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice([1, 100, 4096]))
    return content[:start] + bytes(end - start) + content[end:]


def grown(content: bytes, chance: random.Random) -> bytes:
    return content + chance.choice([b"\0", b"\n", b"{}\n", content[:100], b'{"event":{},"hash":"'])


def spliced(content: bytes, chance: random.Random) -> bytes:
    """A piece of the file stands somewhere else."""
    start, end = sorted(chance.randrange(len(content)) for _ in range(2))
    place = chance.randrange(len(content))
    return content[:place] + content[start:end] + content[place:]


def other(content: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        [b"", b"hello\n", b"[" * 5000, bytes(5000), b"\xff" * 300, b"SQLite format"]
    )


DAMAGES = (flipped, cut, zeroed, grown, spliced, other)


def damaged(root: Path, chance: random.Random) -> Path:
    """Damage one file of the workspace, or remove it; returns which."""
    found = sorted(path for path in (root / ".knowpatch").rglob("*") if path.is_file())
    weights = [8 if path.name in (DATABASE, TEXT) else 1 for path in found]
    (path,) = chance.choices(found, weights)
    content = new = path.read_bytes()
    while new == content:
        new = chance.choice(DAMAGES)(content, chance)
    path.write_bytes(new)
    if chance.random() < 0.05:
        path.unlink()
    return path


VERBS: tuple[tuple[Callable[..., None], dict[str, Any]], ...] = (
    (log.run, {}),
    (log.run, {"events": True, "as_json": True}),
    (show.run, {"edit_id": "ID"}),
    (diff.run, {"weights": True}),
    (diff.run, {"first": "v1", "second": "ID", "weights": True, "as_json": True}),
    (gc.run, {"now": True, "dry_run": True}),
    (tag.run, {}),
)
"""What reads only."""


def say(verb: Callable[..., None], options: dict[str, Any], root: Path) -> str | None:
    """Run a verb as the command line does; its one line if it refuses. (Building the command line
    costs more than all the rest.)"""
    out = io.StringIO()
    with contextlib.chdir(root), contextlib.redirect_stdout(out):
        try:
            verb(**options)
        except KnowpatchError as error:
            return str(error) + out.getvalue()
    return None


@pytest.mark.parametrize("lot", range(10))
def test_whatever_is_damaged_is_named_and_nothing_is_lost(sound: Path, tmp_path: Path, lot: int):
    """Reading changes no byte; verify names the file; --repair brings every event back; what can
    still be read, can be read as before."""
    chance = random.Random(lot)
    whole = Workspace(sound / ".knowpatch")
    events, edits = list(whole.events), list(whole.history.edits.values())
    for number in range(MUTANTS // 10):
        root = tmp_path / str(number)
        shutil.copytree(sound, root)
        path = damaged(root, chance)
        before = files(root)
        verb, given = chance.choice(VERBS)
        given = {name: edits[0].id if word == "ID" else word for name, word in given.items()}
        refused = say(verb, given, root)
        named = [fault.file for fault in verify(root / ".knowpatch").faults]
        assert files(root) == before
        assert all(Path(name).name == path.name for name in named), (path, named)
        assert not refused or ("\n" not in refused and path.stem in refused), refused
        if path.suffix == ".sig":  # one that is gone was demanded by no one; a blank more is none
            assert named or not path.exists() or json.loads(path.read_bytes())
        elif path.name not in (DATABASE, TEXT):
            assert named, path
        elif not named:  # a bit that no event hangs on
            assert list(Workspace(root / ".knowpatch").events) == events
        assert repair(root / ".knowpatch")[0] == len(events)
        mended = Workspace(root / ".knowpatch")
        assert list(mended.events) == events
        for edit in edits:
            if blobs.patch_path(mended.folder, edit.id) != path:
                mended.patch(edit)
        record(mended, patch(77))
        shutil.rmtree(root)


def test_damage_in_both_copies_is_mended_where_they_complete_each_other(
    sound: Path, tmp_path: Path
):
    """Lines of both copies are damaged, never the same one in both: nothing is lost."""
    chance = random.Random(1)
    events = list(Workspace(sound / ".knowpatch").events)
    for number in range(MUTANTS // 25):
        root = tmp_path / str(number)
        shutil.copytree(sound, root)
        text, data = root / ".knowpatch" / TEXT, root / ".knowpatch" / DATABASE
        lines = text.read_bytes().splitlines(keepends=True)
        broken = chance.sample(range(len(lines)), 4)
        for place in broken[:2]:
            lines[place] = lines[place].replace(b'"kind"', b'"kinD"')
        text.write_bytes(b"".join(lines))
        content = data.read_bytes()
        for place in broken[2:]:
            body = events[place].line.encode()
            assert body in content
            content = content.replace(body, body.replace(b'"kind"', b'"kinD"'))
        data.write_bytes(content)
        told = run("verify", "--json", cwd=root).json()
        assert {fault["file"] for fault in told["faults"]} == {TEXT, DATABASE}
        assert told["events"] == len(events)
        assert run("verify", "--repair", cwd=root).code == 0
        assert list(Workspace(root / ".knowpatch").events) == events


def test_a_link_out_of_the_workspace_is_not_followed(tmp_path: Path):
    """An event that names a file by a path is no event: nothing is read or swept elsewhere."""
    workspace = filled(tmp_path, 1)
    body = {**workspace.events[-1].body, "patch": "../../../etc/passwd"}
    with workspace._store.writing() as bodies:
        bodies.append(body)
    for verb in (["log"], ["gc", "--now"], ["verify"]):
        result = run(*verb, cwd=tmp_path)
        assert result.code in (1, 2)
        assert "event 3 (edit)" in result.out + result.err


# -- killed ----------------------------------------------------------------------------------------

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from ledgers import patch, record
from knowpatch.ledger import Workspace
from knowpatch.ledger.verify import verify

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
done = folder.parent / "done"

def work(seed):
    chance = random.Random(seed)
    workspace = Workspace(folder)
    with done.open("a") as told:
        for number in range(10**6):
            workspace.refresh()
            edits = list(workspace.history.edits.values())
            edit = chance.choice(edits) if edits else None
            what = chance.random()
            try:
                if edit is None or what < 0.4:
                    record(workspace, patch(chance.randrange(10**9)), report={"probes": [], "n": 1})
                elif what < 0.6:
                    workspace.tag(f"t{chance.randrange(10**9)}", workspace.history.number)
                elif edit.live:
                    workspace.move(reverts=[edit])
                else:
                    workspace.move(applies=[edit])
            except Exception as error:
                if "live" not in str(error):
                    raise
                continue
            told.write(workspace.history.head + "\\n")
            told.flush()

moments = random.Random(kills)
for number in range(kills):
    children = []
    for writer in range(1 + number % 2):
        child = os.fork()
        if child == 0:
            try:
                work(1000 * number + writer)
            finally:
                os._exit(1)
        children.append(child)
    time.sleep(moments.uniform(0.01, 0.25))
    for child in children:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "a writer ended by itself"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = verify(folder)
    assert not found.faults, found.faults
    hashes = {event.hash for event in Workspace(folder).events}
    lost = [line for line in done.read_text().splitlines() if line not in hashes]
    assert not lost, lost
print(len(hashes))
"""


@fork
def test_killed_at_random_moments_it_is_a_valid_workspace(tmp_path: Path):
    """One or two writers, SIGKILL; everything that a writer was told is done is there."""
    workspace = Workspace.create(tmp_path)
    (tmp_path / "done").touch()
    command = [sys.executable, "-c", DRIVER, str(workspace.folder), str(KILLS)]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > KILLS
    gone = run("gc", "--now", "--json", cwd=tmp_path)
    assert gone.code == 0
    assert not verify(workspace.folder).notes


EDITOR = """
import os, random, signal, sys, time
import torch, transformers
from pathlib import Path
from knowpatch.cli import main
from knowpatch.editing import load
from knowpatch.ledger import Workspace
from knowpatch.ledger.verify import verify

words, kills = sys.argv[3:], int(sys.argv[2])
os.chdir(sys.argv[1])

def start():
    child = os.fork()
    if child == 0:
        try:
            main(words)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(9)
    return child

moments = random.Random(kills)
longest = 4.0
for number in range(kills):
    child = start()
    time.sleep(moments.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = verify(Path(".knowpatch"))
    assert not found.faults, found.faults
    workspace = Workspace(Path(".knowpatch"))
    for edit in workspace.live():
        workspace.move(reverts=[edit])
began = time.monotonic()
assert os.waitpid(start(), 0)[1] in (0, 256)
assert len(Workspace(Path(".knowpatch")).live()) == 1
"""


@fork
def test_a_killed_edit_leaves_a_valid_workspace(tmp_path: Path, folder: Path):
    """The command itself, killed while it loads, computes, asks or records; the next one works."""
    run("init", "--model", folder, cwd=tmp_path)
    words = ["edit", "The capital of France is", "--subject", "France", "--target", "Rome"]
    words += ["--set", "learning_rate=0.01", "--set", "steps=10", "--json"]
    command = [sys.executable, "-c", EDITOR, str(tmp_path), str(EDIT_KILLS), *words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(run("verify", "--json", cwd=tmp_path).out)["sound"]
