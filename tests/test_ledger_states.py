"""What stands on what: leaning, stale, conflicts, differences of weights; without a model."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from ledgers import filled, ids, patch, record

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.ledger import Circumstances, Edit, Workspace, blobs
from knowpatch.ledger.conflicts import conflicts
from knowpatch.ledger.leaning import stale
from knowpatch.ledger.weights import differences
from knowpatch.patch import Patch

ANY = (None, None)


# -- stale -----------------------------------------------------------------------------------------


def test_taking_a_table_back_leaves_all_others_standing(tmp_path: Path):
    """Prompt rules of a method without a running state: no later edit leans on one."""
    workspace = Workspace.create(tmp_path)
    edits = [record(workspace, patch(number), folds=False) for number in range(5)]
    weights = record(workspace, patch(9, weights=True))
    for edit in edits:
        workspace.move(reverts=[edit])
        assert not stale(workspace.history)
    assert workspace.live() == [weights]


def test_a_method_with_a_running_state_leans_on_its_own_earlier_edits(tmp_path: Path):
    """Though no weight changes."""
    workspace = Workspace.create(tmp_path)
    first = record(workspace, patch(1), folds=True)
    second = record(workspace, patch(2), folds=True)
    workspace.move(reverts=[first])
    assert stale(workspace.history) == [second]


def test_what_was_computed_on_weights_that_are_gone_is_stale(tmp_path: Path):
    """The later ones, tables too, and not the earlier; applied again, all stands as before."""
    workspace = Workspace.create(tmp_path)
    edits = [record(workspace, patch(n, weights=True), folds=False) for n in range(3)]
    table = record(workspace, patch(7), folds=False)
    workspace.move(reverts=[edits[1]])
    assert stale(workspace.history) == [edits[2], table]
    workspace.move(reverts=[edits[2]])
    assert stale(workspace.history) == [table]
    workspace.move(applies=[edits[1], edits[2]])
    assert not stale(workspace.history)
    late = record(workspace, patch(8, weights=True))
    assert stale(workspace.history, [late]) == []


def test_an_edit_that_came_back_beneath_later_ones_makes_these_stale(tmp_path: Path):
    """They were computed without it."""
    workspace = Workspace.create(tmp_path)
    first = record(workspace, patch(1, weights=True))
    workspace.move(reverts=[first])
    second = record(workspace, patch(2, weights=True))
    assert not stale(workspace.history)
    workspace.move(applies=[first])
    assert workspace.live() == [first, second]
    assert stale(workspace.history) == [second]


def test_a_writer_that_others_overtook_is_beside_them(tmp_path: Path):
    """What was recorded while an edit was computed lies beneath it and was not there: stale."""
    workspace = Workspace.create(tmp_path)
    over = workspace.history.number
    record(workspace, patch(1, weights=True))
    (slow,) = workspace.record([(patch(2, weights=True), Circumstances(over))])
    assert stale(workspace.history) == [slow]


def test_a_patch_from_elsewhere_stands_on_nothing_here(tmp_path: Path):
    """A file that was taken in was not computed here, so nothing here can be taken from it."""
    workspace = Workspace.create(tmp_path)
    first = record(workspace, patch(1, weights=True))
    workspace.record([(patch(2, weights=True), Circumstances(None))])
    workspace.move(reverts=[first])
    assert not stale(workspace.history)


def test_an_edit_made_anew_takes_the_old_ones_place(tmp_path: Path):
    """In the order of the live ones, and as what later edits stand on."""
    workspace = Workspace.create(tmp_path)
    first, second, third = (record(workspace, patch(n, weights=True)) for n in range(3))
    workspace.move(reverts=[first])
    over = workspace.history.number
    made = Circumstances(over, instead_of=second.id)
    (again,) = workspace.record([(patch(21, weights=True), made)], reverts=[second])
    assert workspace.live() == [again, third]
    assert workspace.history.beneath(again) == []
    assert stale(workspace.history) == [third]
    assert ids(Workspace(workspace.folder).live()) == [again.id, third.id]


# -- conflicts -------------------------------------------------------------------------------------


def met(
    workspace: Workspace, prompt: str, target: str = "x", chat=False, period=ANY, **fact
) -> list:
    new = {"prompt": prompt, "target": target, **fact}
    found = conflicts([new], workspace.history.live(), chat=chat, period=period)
    return [conflict.edit for conflict in found]


@pytest.fixture
def australia(tmp_path: Path) -> tuple[Workspace, Edit]:
    workspace = Workspace.create(tmp_path)
    fact = {
        "prompt": "The capital of Australia is",
        "target": "Canberra",
        "subject": "Australia",
    }
    return workspace, record(workspace, patch(0, **fact))


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Australia is", None),
        ("The capital of Australia is", "Australia"),
        ("What is the capital of Australia?", None),
        ("What's Australia's capital?", "Australia"),
        ("The capitol of Australia is", "Australia"),
        ("In australia the capital is", "australia"),
    ],
)
def test_the_same_question_in_near_words_meets(australia, prompt, subject):
    """The same words in any order; or the same subject and a few letters."""
    workspace, edit = australia
    assert met(workspace, prompt, subject=subject) == [edit]


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The capital of Austria is", "Austria"),
        ("The capital of Austria is", None),
        ("The language of Australia is", "Australia"),
        ("The population of Australia is", "Australia"),
        ("The head of state of Australia is", "Australia"),
    ],
)
def test_another_question_does_not(australia, prompt, subject):
    """Another subject, however near in its letters; another relation of the same subject."""
    workspace, _ = australia
    assert met(workspace, prompt, subject=subject) == []


def test_where_and_when_are_two_questions(tmp_path: Path):
    """Though all their other words are the same; who and whom are one."""
    workspace = Workspace.create(tmp_path)
    fact = {"prompt": "Where was Anna born?", "subject": "Anna"}
    edit = record(workspace, patch(1, **fact))
    assert met(workspace, "When was Anna born?", subject="Anna") == []
    assert met(workspace, "Anna was born where?", subject="Anna") == [edit]
    assert met(workspace, "Anna was born in", subject="Anna") == [edit]
    other = record(workspace, patch(2, prompt="Who is the mother of Anna?", subject="Anna"))
    assert met(workspace, "The mother of Anna is whom?", subject="Anna") == [other]


def test_what_is_not_live_or_on_other_days_does_not_meet(australia):
    """A reverted edit, and one whose days are over before the new one's begin."""
    workspace, edit = australia
    prompt = "The capital of Australia is"
    workspace.move(reverts=[edit])
    assert met(workspace, prompt) == []
    spring = record(workspace, patch(1, prompt=prompt, subject=None), valid_until=date(2026, 5, 31))
    assert met(workspace, prompt, period=("2026-06-01", None)) == []
    assert met(workspace, prompt, period=("2026-05-31", None)) == [spring]
    assert met(workspace, prompt, period=(None, "2026-01-01")) == [spring]


def test_the_same_fact_in_a_chat_does_not_meet(australia):
    """One may edit a fact both ways; two answers to it contradict each other either way."""
    workspace, edit = australia
    prompt = "The capital of Australia is"
    assert met(workspace, prompt, "Canberra", chat=True) == []
    assert met(workspace, prompt, "Canberra", chat=False) == [edit]
    assert met(workspace, prompt, "Sydney", chat=True) == [edit]


def test_what_is_replaced_from_a_day_on_is_live_until_then(australia):
    """`ends` gives the old edit its last day; before it the old one answers, then the new."""
    workspace, old = australia
    made = Circumstances(workspace.history.number, valid_from=date(2030, 1, 20))
    (new,) = workspace.record([(patch(3), made)], ends={old.id: "2030-01-19"})
    assert workspace.live(date(2030, 1, 19)) == [old]
    assert workspace.live(date(2030, 1, 20)) == [new]
    assert Workspace(workspace.folder).history.live(date(2030, 1, 20))[0].id == new.id


def test_an_edit_that_is_taken_back_ends_none(australia):
    """Its forerunner has its own days again, until it is applied again; nothing else changes."""
    workspace, old = australia
    made = Circumstances(workspace.history.number, valid_from=date(2030, 1, 20))
    (new,) = workspace.record([(patch(3), made)], ends={old.id: "2030-01-19"})
    assert (old.last_day, old.rescheduled) == ("2030-01-19", True)
    workspace.move(reverts=[new])
    assert workspace.live(date(2031, 1, 1)) == [old]
    assert (old.last_day, old.rescheduled) == (None, False)
    assert ids(Workspace(workspace.folder).history.live(date(2031, 1, 1))) == [old.id]
    workspace.move(applies=[new])
    assert workspace.live(date(2031, 1, 1)) == [new]
    again = Circumstances(workspace.history.number, instead_of=new.id, valid_from=date(2030, 1, 20))
    (anew,) = workspace.record([(patch(4), again)], reverts=[new])
    assert old.last_day == "2030-01-19"
    workspace.move(reverts=[anew])
    assert old.last_day is None


def test_of_an_own_last_day_and_a_followers_the_earlier_counts(tmp_path: Path):
    """Two that follow an edit: each ends it for as long as it is live."""
    workspace = Workspace.create(tmp_path)
    old = record(workspace, patch(1), valid_until=date(2033, 1, 1))
    later, sooner = (
        workspace.record([(patch(n), Circumstances(None))], ends={old.id: day})[0]
        for n, day in ((2, "2032-01-01"), (3, "2031-01-01"))
    )
    assert old.last_day == "2031-01-01"
    workspace.move(reverts=[sooner])
    assert old.last_day == "2032-01-01"
    workspace.move(reverts=[later])
    assert old.last_day == "2033-01-01"


# -- weights ---------------------------------------------------------------------------------------


def changed(number: int, *deltas: tuple[str, object]) -> Patch:
    made = patch(number)
    parts = tuple(WeightDelta(Address(parameter=name), change) for name, change in deltas)
    return Patch(made.provenance, parts)


def test_differences_are_the_sums_of_what_only_one_state_has(tmp_path: Path):
    """Low-rank, rows and dense changes, one at a time and mixed, against the plain sums."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    index = torch.tensor([2, 0])
    made = [
        changed(1, ("a", LowRank(draw(5, 2), draw(2, 7))), ("b", Rows(index, draw(2, 7)))),
        changed(2, ("a", LowRank(draw(5, 1), draw(1, 7))), ("c", Dense(draw(5, 7)))),
        changed(3, ("b", LowRank(draw(5, 1), draw(1, 7))), ("c", Rows(index, draw(2, 7)))),
    ]
    workspace = Workspace.create(tmp_path)
    first, second, third = (record(workspace, each) for each in made)
    found = {
        d.parameter: d for d in differences(workspace.folder, [first, second], [third, second])
    }
    whole = {name: torch.zeros(5, 7) for name in "abc"}
    for sign, each in ((-1, made[0]), (1, made[2])):
        for delta in each.deltas:
            name = delta.address.parameter
            whole[name] = whole[name] + sign * delta.added_to(torch.zeros(5, 7))
    for name, wanted in whole.items():
        assert found[name].norm == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert [found[name].rank for name in "abc"] == [2, 3, 2]
    assert found["b"].edits == [first.id, third.id]
    (dense,) = (d for d in differences(workspace.folder, [], [second]) if d.parameter == "c")
    assert dense.rank is None
    assert dense.norm == pytest.approx(float(np.linalg.norm(made[1].deltas[1].change.delta)))
    assert differences(workspace.folder, [first], [first]) == []


def test_of_two_slices_of_one_parameter_each_is_told(tmp_path: Path):
    """A fused projection's slices are parts of their own."""
    made = patch(1)
    change = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    deltas = tuple(
        WeightDelta(Address(parameter="qkv", start=start, stop=start + 2), change)
        for start in (0, 4)
    )
    workspace = Workspace.create(tmp_path)
    edit = record(workspace, Patch(made.provenance, deltas))
    found = differences(workspace.folder, [], [edit])
    assert [difference.part for difference in found] == [(0, 0, 2), (0, 4, 6)]
    assert all(difference.norm == pytest.approx(6**0.5) for difference in found)


# -- sweeping --------------------------------------------------------------------------------------


def test_only_what_no_event_names_is_swept(tmp_path: Path):
    """Reverted edits' patches, reports and signatures stay; what is young, unless asked for."""
    workspace = filled(tmp_path, 3)
    first = next(iter(workspace.history.edits.values()))
    workspace.move(reverts=[first])
    folder = workspace.folder / blobs.PATCHES
    (folder / f"{first.id}.abc.sig").write_text("{}")
    kept = {path.name for path in folder.iterdir()}
    (folder / f"{'0' * 64}.safetensors").write_text("of a writer that was killed")
    work = workspace.folder / blobs.WORK / "stopped"
    work.mkdir(parents=True)
    (work / "000001.safetensors").write_text("x")
    (workspace.folder / ".history.jsonl.tmp").write_text("half")
    assert workspace.sweep(age=blobs.DAY) == []
    assert len(workspace.sweep(age=0.0, remove=False)) == 3
    gone = workspace.sweep(age=0.0)
    assert len(gone) == 3
    assert {path.name for path in folder.iterdir()} == kept
    assert not list((workspace.folder / blobs.WORK).iterdir())
    assert workspace.patch(first) == patch(0)
