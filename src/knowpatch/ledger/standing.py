"""Bringing a model to a state of the workspace, and asking it there.

The model's live patches are made those of a state, in order: what is not in it is dropped, what is
missing is applied. `EditedModel` folds; nothing is ever subtracted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from knowpatch.data.case import REPHRASE, REWRITE, Probe, accepted
from knowpatch.edited import EditedModel
from knowpatch.effects import Answer, Effect, compare
from knowpatch.errors import OptionError, PatchError
from knowpatch.fits import canonical_names, check_fits
from knowpatch.ledger import blobs
from knowpatch.ledger.copies import Fault
from knowpatch.ledger.history import Edit
from knowpatch.ledger.workspace import Workspace
from knowpatch.method import METHODS, EditMethod
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest


def bring(model: EditedModel, patches: Sequence[Patch]) -> None:
    """Make `patches` the live ones of the model, in this order."""
    wanted = list(patches)
    model.drop(*(patch.id for patch in model.live if patch not in wanted))
    same = 0
    for patch, other in zip(model.live, wanted, strict=False):
        if patch != other:
            break
        same += 1
    model.drop(*(patch.id for patch in model.live[same:]))
    for patch in wanted[same:]:
        model.apply(patch)


@contextlib.contextmanager
def standing(model: EditedModel, patches: Sequence[Patch]) -> Iterator[None]:
    """`patches` are the live ones within the block; as before after it."""
    before = model.live
    try:
        bring(model, patches)
        yield
    finally:
        bring(model, before)


def method_of(edit: Edit) -> EditMethod:
    """The method that made an edit, configured and seeded as it was.

    Raises:
        OptionError: it is not known here, or does not take these options any more.
    """
    made = edit.recorded
    cls = METHODS.get(made["method"])
    return cls(cls.configure(made["config"]), seed=int(made["seed"]))


def requests_of(edit: Edit) -> list[EditRequest]:
    return [EditRequest(**request) for request in edit.requests]


def questions(edit: Edit, first: int = 0) -> list[Probe]:
    """What an edit was to change: its prompts and given rephrases, in the way that was edited.

    Args:
        first: the number of its first request among those of all the edits that are asked for.
    """
    try:
        method: EditMethod | None = method_of(edit)
    except OptionError:  # a method of someone else's: its patch can still be asked
        method = None
    chat = bool(edit.recorded["config"].get("chat", False))
    found = []
    for number, request in enumerate(requests_of(edit), first):
        wanted = request.target if method is None else method.expected(request)
        answer = wanted if wanted is not None else request.old
        answers = () if answer is None else accepted(answer)
        found.append(Probe(REWRITE, request.prompt, answers, chat, number))
        found += [Probe(REPHRASE, text, answers, chat, number) for text in request.rephrases]
    return found


def asked_in(
    model: EditedModel,
    probes: Sequence[Probe],
    first: Sequence[Patch],
    second: Sequence[Patch],
    *,
    progress: Progress = silent,
) -> list[Effect]:
    """Ask every probe in two states; the model is given back as it was."""
    with standing(model, first):
        return compare(model, probes, standing(model, second), progress=progress)


def flips(effect: Effect) -> bool | None:
    """Whether an edited answer is right now and was not before (True), or the other way round
    (False); None where it stayed as it was."""
    before, after = (_right(effect, answer) for answer in (effect.before, effect.after))
    return None if before == after else after


def _right(effect: Effect, answer: Answer) -> bool:
    """Whether the wanted answer is the likeliest at each token; said, where none can be forced."""
    if answer.accuracy is None:
        return effect.expected.strip().casefold() in answer.text.casefold()
    return answer.accuracy == 1.0


def misfits(
    workspace: Workspace, model: EditedModel, *, progress: Progress = silent
) -> Iterator[Fault]:
    """The live patches that do not fit the model, whose touched tensors are hashed anew."""
    names = canonical_names(model.model)
    live = workspace.live()
    for number, edit in enumerate(live):
        progress("checking patches against the model", number, len(live))
        patch = workspace.patch(edit)
        tied = [delta.address.parameter for delta in patch.deltas]
        try:
            check_fits(patch, model.view, names, tied)
        except PatchError as error:
            yield Fault(f"{blobs.PATCHES}/{edit.id}.safetensors", f"edit {edit.short}: {error}")
    progress("checking patches against the model", 1, 1)
