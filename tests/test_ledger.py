"""The ledger: a chain of events, what it says, and who may write when."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from ledgers import FINGERPRINT, filled, ids, patch, record

from knowpatch.errors import DataError, InputError, OptionError, PatchError
from knowpatch.ledger import Note, Workspace, blobs
from knowpatch.ledger.chain import Event, digest, joined, linked, written
from knowpatch.ledger.copies import repair
from knowpatch.ledger.history import History
from knowpatch.ledger.store import DATABASE, TEXT, stored_in
from knowpatch.ledger.verify import verify


def chain(count: int) -> list[Event]:
    events: list[Event] = []
    for number in range(count):
        before = events[-1].hash if events else ""
        events.append(written(number + 1, before, {"kind": "tag", "name": f"t{number}"}))
    return events


def stored(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.hash, event.line) for event in events]


# -- the chain -------------------------------------------------------------------------------------


def test_a_hash_is_that_of_the_line_and_names_the_one_before():
    """SHA-256 of canonical JSON that holds the hash before it: a known case, by hand."""
    first = written(1, "", {"kind": "init", "b": 1, "a": "ü"})
    assert first.line == '{"a":"ü","b":1,"kind":"init","previous":""}'
    second = written(2, first.hash, {"kind": "tag"})
    assert json.loads(second.line)["previous"] == digest(first.line) == first.hash
    assert linked(stored([first, second])) == [first, second]


@pytest.mark.parametrize("place", [0, 3, 9])
def test_a_changed_event_is_named(place: int):
    """A changed line, with its hash made to fit or not, breaks the chain at a number."""
    items = stored(chain(10))
    old, line = items[place]
    line = line.replace("t", "T", 1)
    with pytest.raises(DataError, match=f"event {place + 1} was changed"):
        linked([*items[:place], (old, line), *items[place + 1 :]])
    forged = [*items[:place], (digest(line), line), *items[place + 1 :]]
    if place < 9:
        with pytest.raises(DataError, match=f"event {place + 2} does not follow"):
            linked(forged)


def test_two_damaged_copies_give_the_whole_chain():
    """What either copy holds is put together; what both lack is counted, not passed over."""
    events = chain(12)
    one, other = stored(events), stored(events)
    for number in (0, 4, 11):
        one[number] = ("0" * 64, "broken")
    for number in (1, 5, 10):
        other[number] = (other[number][0], "{}")
    assert joined(one, other) == (events, 0)
    other[4] = ("", "")
    whole, lost = joined(one, other)
    assert whole == events[:4]
    assert lost == 7


@pytest.mark.parametrize("body", [{"kind": "x", "n": float("nan")}, {"kind": "x", "t": "\ud800"}])
def test_what_cannot_be_stored_is_refused(body: dict):
    """Half a surrogate pair and NaN are no JSON in UTF-8."""
    with pytest.raises(InputError):
        written(1, "", body)


@pytest.mark.parametrize("kind", ["unknown", "edit", "apply", "tag", "init", "trust"])
def test_an_event_of_a_later_version_is_refused_in_one_line(kind: str):
    """An event that this version does not understand is named; no KeyError."""
    event = written(1, "", {"kind": kind, "format": 99, "applies": ["?"], "reverts": 3})
    with pytest.raises(DataError, match=f"event 1 \\({kind}\\)"):
        History().add([event])


# -- what the history says -------------------------------------------------------------------------


def test_edits_are_recorded_with_all_that_was_asked_for(tmp_path: Path):
    """Request, method, config, seed, fingerprint, author, reason, source, time and scores."""
    workspace = Workspace.create(tmp_path, model="some/model")
    report = {"probes": [{"kind": "rewrite", "request": 0}]}
    made = patch(1)
    edit = record(workspace, made, reason="wrong", source="a ticket", took=[True], report=report)
    assert edit.recorded["requests"] == [made.provenance.requests[0].model_dump(mode="json")]
    expected = {
        "method": "by hand",
        "config": {"strength": 0.5},
        "seed": 1,
        "fingerprint": FINGERPRINT,
        "author": "Anna",
        "reason": "wrong",
        "source": "a ticket",
        "took": [True],
        "patch": made.id,
    }
    assert {name: edit.recorded[name] for name in expected} == expected
    assert edit.recorded["time"].endswith("Z")
    again = Workspace(tmp_path / ".knowpatch")
    (found,) = again.live()
    assert found.recorded == edit.recorded
    assert again.report(found) == report
    assert again.patch(found) == made
    assert again.model == "some/model"


def test_live_edits_keep_their_places_whatever_is_reverted_when(tmp_path: Path):
    """Any order of reverts and applies leads to the order of recording among the live ones."""
    workspace = filled(tmp_path, 8)
    edits = list(workspace.history.edits.values())
    order = random.Random(0)
    live = set(ids(edits))
    for _ in range(40):
        edit = order.choice(edits)
        if edit.live:
            workspace.move(reverts=[edit])
            live.remove(edit.id)
        else:
            workspace.move(applies=[edit])
            live.add(edit.id)
        assert ids(workspace.live()) == [edit.id for edit in edits if edit.id in live]
    assert ids(Workspace(workspace.folder).live()) == ids(workspace.live())


def test_a_state_is_named_by_an_edit_a_tag_base_and_now(tmp_path: Path):
    """Each gives what was live right after it."""
    workspace = filled(tmp_path, 3)
    history = workspace.history
    first, second, third = history.edits.values()
    workspace.tag("v1", history.number)
    workspace.move(reverts=[second])
    for name, expected in {
        "base": [],
        second.id[:10]: [first, second],
        "v1": [first, second, third],
        "now": [first, third],
    }.items():
        assert history.live(at=history.state(name)) == expected
    with pytest.raises(OptionError, match="tags: v1"):
        history.state("v2")
    for name in ("v1", "now", "base", "", "a b", "ü", "../x"):
        with pytest.raises(OptionError, match="tag"):
            workspace.tag(name, 1)


def test_a_beginning_of_an_id_has_to_be_unique(tmp_path: Path):
    """An ambiguous, an unknown and an empty beginning are refused, each in its own words."""
    history = filled(tmp_path, 20).history  # more than the sixteen first digits
    edit = next(iter(history.edits.values()))
    assert history.edit(edit.id[:12].upper()) is edit
    with pytest.raises(OptionError, match="begins with"):
        history.edit("zz")
    with pytest.raises(OptionError, match="begins with"):
        history.edit("")
    first = [id_[0] for id_ in history.edits]
    twice = next(letter for letter in first if first.count(letter) > 1)
    with pytest.raises(OptionError, match="give more of it"):
        history.edit(twice)


def test_edits_are_live_on_their_days(tmp_path: Path):
    """First and last day are included; without a limit, always."""
    workspace = Workspace.create(tmp_path)
    spring = record(workspace, patch(1), valid_from=date(2026, 3, 1), valid_until=date(2026, 5, 31))
    always = record(workspace, patch(2))
    for day, live in {
        date(2026, 2, 28): [always],
        date(2026, 3, 1): [spring, always],
        date(2026, 5, 31): [spring, always],
        date(2026, 6, 1): [always],
    }.items():
        assert workspace.live(day) == live


def test_what_lay_beneath_an_edit_is_what_was_live_then(tmp_path: Path):
    """Not what is live now; of a sequence, the turns before."""
    workspace = filled(tmp_path, 3)
    first, second, third = workspace.history.edits.values()
    workspace.move(reverts=[first])
    later = record(workspace, patch(7))
    assert workspace.history.beneath(third) == [first, second]
    assert workspace.history.beneath(later) == [second, third]
    from knowpatch.ledger import Circumstances

    over = workspace.history.number
    record(workspace, patch(8))  # someone else's, meanwhile
    turns = [(patch(10 + n), Circumstances(over, sequence="s", turn=n)) for n in range(3)]
    made = workspace.record(turns)
    assert workspace.history.beneath(made[2]) == [second, third, later, *made[:2]]


# -- recording -------------------------------------------------------------------------------------


def test_the_same_patch_twice_is_refused_and_applied_again_after_a_revert(tmp_path: Path):
    """What is live is not recorded twice; what was taken back comes back to its place."""
    workspace = filled(tmp_path, 2)
    first, second = workspace.history.edits.values()
    with pytest.raises(PatchError, match="live already"):
        record(workspace, patch(0))
    workspace.move(reverts=[first])
    assert record(workspace, patch(0)) is first
    assert workspace.live() == [first, second]
    assert len(workspace.history.edits) == 2


def test_what_is_edited_again_for_other_days_is_live_on_those(tmp_path: Path):
    """Though the patch, and so the edit, is the same as the one that was taken back."""
    workspace = Workspace.create(tmp_path)
    edit = record(workspace, patch(1))
    workspace.move(reverts=[edit])
    record(workspace, patch(1), valid_from=date(2030, 1, 1))
    for history in (workspace.history, Workspace(workspace.folder).history):
        assert history.live(date(2029, 12, 31)) == []
        assert ids(history.live(date(2030, 1, 1))) == [edit.id]
    workspace.move(reverts=[edit])
    workspace.move(applies=[edit])  # which says nothing of days
    assert workspace.live(date(2029, 12, 31)) == []


def test_a_patch_for_another_model_is_refused(tmp_path: Path):
    """The first edit says which model a workspace is of; nothing is recorded of another."""
    workspace = filled(tmp_path, 1)
    before = workspace.history.number
    with pytest.raises(PatchError, match="another workspace"):
        record(workspace, patch(5, fingerprint="0" * 64))
    assert Workspace(workspace.folder).history.number == before


def test_moving_what_is_not_there_to_move_is_refused(tmp_path: Path):
    """A live edit is not applied, one that is not live is not reverted, and nothing is added."""
    workspace = filled(tmp_path, 2)
    first, second = workspace.history.edits.values()
    with pytest.raises(OptionError, match="live already"):
        workspace.move(applies=[first])
    workspace.move(reverts=[first], note=Note("Bert", "no"))
    with pytest.raises(OptionError, match="not live"):
        workspace.move(reverts=[second, first])
    assert second.live
    assert first.touched[-1].body["reason"] == "no"


def test_a_replacement_is_one_step(tmp_path: Path):
    """The new edit comes and the old one goes with one event."""
    workspace = filled(tmp_path, 2)
    first, second = workspace.history.edits.values()
    number = workspace.history.number
    from knowpatch.ledger import Circumstances

    (new,) = workspace.record([(patch(9), Circumstances(number))], reverts=[first])
    assert workspace.live() == [second, new]
    assert workspace.history.number == number + 1


WRITERS = """
import os, sys
from pathlib import Path
from ledgers import patch, record
from knowpatch.ledger import Workspace

def write(writer):
    workspace = Workspace(Path(sys.argv[1]))
    for number in range(8):
        record(workspace, patch(100 * writer + number))

children = []
for writer in range(1, 5):
    children.append(os.fork())
    if children[-1] == 0:
        try:
            write(writer)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_several_processes_write_at_once(tmp_path: Path):
    """Four writers, eight edits each: every edit is there once, and the chain holds."""
    workspace = Workspace.create(tmp_path)
    command = [sys.executable, "-c", WRITERS, str(workspace.folder)]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = verify(workspace.folder)
    assert not found.faults
    seeds = sorted(edit.recorded["seed"] for edit in found.history.edits.values())
    assert seeds == [100 * n + m for n in range(1, 5) for m in range(8)]
    assert len(workspace.refresh().edits) == 32


# -- two copies ------------------------------------------------------------------------------------


def test_both_copies_hold_the_same_events(tmp_path: Path):
    """The text is the database's events, line by line, and each line is JSON."""
    workspace = filled(tmp_path, 3)
    content = (workspace.folder / TEXT).read_bytes()
    assert stored_in(content) == stored(list(workspace.events))
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["event"]["kind"] for line in lines] == ["init", "edit", "edit", "edit"]


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_a_writer_killed_between_the_copies_leaves_a_valid_workspace(tmp_path: Path, cut: int):
    """A whole line that the database lacks is taken in; a torn one is cut off."""
    workspace = filled(tmp_path, 2)
    old = (workspace.folder / DATABASE).read_bytes()
    record(workspace, patch(5))
    (workspace.folder / DATABASE).write_bytes(old)
    text = workspace.folder / TEXT
    text.write_bytes(text.read_bytes()[: len(text.read_bytes()) - cut])
    assert not verify(workspace.folder).faults
    again = Workspace(workspace.folder)
    assert len(again.history.edits) == 2
    record(again, patch(6))
    assert len(again.history.edits) == (4 if cut == 0 else 3)
    found = verify(workspace.folder)
    assert not found.faults
    assert not found.notes


def test_a_block_that_fails_adds_nothing(tmp_path: Path):
    """An error inside leaves both copies as they were, and the next writer is not held up."""
    workspace = filled(tmp_path, 1)
    before = (workspace.folder / TEXT).read_bytes()

    def fail() -> None:
        with workspace.writing() as bodies:
            bodies.append({"kind": "tag", "name": "x", "at": 1})
            raise OptionError("no")

    with pytest.raises(OptionError, match="no"):
        fail()
    assert (workspace.folder / TEXT).read_bytes() == before
    record(workspace, patch(3))
    assert not verify(workspace.folder).faults


@pytest.mark.parametrize("lost", [DATABASE, TEXT])
def test_a_lost_copy_is_made_anew_from_the_other(tmp_path: Path, lost: str):
    """Without one of the two, work is refused in one line, and --repair writes both."""
    workspace = filled(tmp_path, 3)
    before = list(workspace.events)
    (workspace.folder / lost).unlink()
    assert [fault.file for fault in verify(workspace.folder).faults] == [lost]
    with pytest.raises(DataError, match="knowpatch verify --repair"):
        record(Workspace(workspace.folder), patch(7))
    count, aside = repair(workspace.folder)
    assert count == 4
    assert aside is not None
    assert not verify(workspace.folder).faults
    assert list(Workspace(workspace.folder).events) == before
    assert repair(workspace.folder) == (4, None)


def test_a_repair_can_be_stopped_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before each of its renames: what is there then can be mended again, with nothing lost."""
    workspace = filled(tmp_path, 3)
    before = list(workspace.events)
    for stop in range(2):
        data = workspace.folder / DATABASE
        data.write_bytes(data.read_bytes()[:5000])
        calls = []

        def replace(source, target, calls=calls, stop=stop, real=os.replace):
            calls.append(target)
            if len(calls) > stop:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            repair(workspace.folder)
        monkeypatch.undo()
        assert repair(workspace.folder)[0] == 4
        assert list(Workspace(workspace.folder).events) == before
        assert not verify(workspace.folder).faults


def test_what_is_damaged_in_both_copies_stays_as_it_is(tmp_path: Path):
    """No event is dropped to make a chain whole: repair refuses and changes nothing."""
    workspace = filled(tmp_path, 3)
    text = workspace.folder / TEXT
    text.write_bytes(text.read_bytes().replace(b"why 1", b"WHY 1"))
    data = workspace.folder / DATABASE
    data.write_bytes(data.read_bytes().replace(b"why 1", b"WHY 1"))
    before = text.read_bytes(), data.read_bytes()
    with pytest.raises(DataError, match="event 3 is damaged in both"):
        repair(workspace.folder)
    assert (text.read_bytes(), data.read_bytes()) == before
    assert {fault.file for fault in verify(workspace.folder).faults} == {DATABASE, TEXT}


# -- files -----------------------------------------------------------------------------------------


def test_a_changed_file_is_named_and_refused(tmp_path: Path):
    """A flipped bit in a patch or a report: verify names the edit, and reading refuses."""
    workspace = filled(tmp_path, 3)
    first, second, third = workspace.history.edits.values()
    damaged = blobs.patch_path(workspace.folder, first.id)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    blobs.patch_path(workspace.folder, second.id).unlink()
    blobs.report_path(workspace.folder, third.recorded["report"]).write_text("{}")
    faults = verify(workspace.folder).faults
    named = zip((first, second, third), faults, strict=True)
    assert all(edit.short in fault.what for edit, fault in named)
    for edit, what in ((first, "damaged"), (second, "missing")):
        with pytest.raises(DataError, match=what):
            workspace.patch(edit)
    with pytest.raises(DataError, match="damaged"):
        workspace.report(third)
    assert workspace.patch(third) == patch(2)


def test_a_patch_that_is_not_the_recorded_one_is_named(tmp_path: Path):
    """A whole patch under another's name, with an event that was forged to fit, does not pass."""
    workspace = filled(tmp_path, 1)
    body = {**workspace.events[-1].body, "seed": 3}
    folder = tmp_path / "forged"
    folder.mkdir()
    other = Workspace.create(folder)
    blobs.put(blobs.patch_path(other.folder, body["patch"]), patch(0).to_bytes())
    with other.writing() as bodies:
        bodies.append({**body, "report": None})
    (fault,) = verify(other.folder).faults
    assert "its seed is not what was recorded" in fault.what


def test_there_is_one_workspace_to_a_folder(tmp_path: Path):
    """init does not touch what is there; a workspace is found from below."""
    workspace = filled(tmp_path, 1)
    with pytest.raises(InputError, match="exists already"):
        Workspace.create(tmp_path)
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    found = Workspace.above(below)
    assert found is not None
    assert found.folder == workspace.folder
    assert list(found.history.edits) == list(workspace.history.edits)
