"""Ship patches: written to a target, loaded back, asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from knowpatch import __version__
from knowpatch.edited import EditedModel
from knowpatch.errors import InputError, OptionError, PatchError, did_you_mean
from knowpatch.export.context import Context
from knowpatch.export.gguf import Gguf
from knowpatch.export.gguf_lora import GgufLora
from knowpatch.export.merged import Merged
from knowpatch.export.parity import Observed, Parity, Question, compare, observe, questions_for
from knowpatch.export.peft import Peft
from knowpatch.export.places import MARK, check_place, placed, size_of
from knowpatch.export.target import Base, Cargo, Target
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent

TARGETS: Mapping[str, type[Target]] = {
    target.name: target for target in (Merged, Peft, Gguf, GgufLora, Context)
}


def target_called(name: str, options: Mapping[str, Any] | None = None) -> Target:
    """The target of that name with options, those that are None left out.

    Raises:
        OptionError: an unknown target, or an option that it does not have.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}: {did_you_mean(name, TARGETS)}")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in given:
        if key not in _options(TARGETS[name]):
            having = [other for other, cls in TARGETS.items() if key in _options(cls)]
            raise OptionError(f"--{key} is for {', '.join(having)}, not for {name}")
    return TARGETS[name](**given)


def _options(target: type[Target]) -> list[str]:
    return [field.name for field in dataclasses.fields(target)]


@dataclass(frozen=True)
class Shipped:
    """An artefact that was written, loaded back and asked.

    Attributes:
        to: the target's name; path: where it is; size: bytes.
        source: the model; patches: ids, in order.
        notes: what to know of it.
        parity: how it compares with the model that it was made from.
    """

    to: str
    path: Path
    size: int
    source: str
    patches: tuple[str, ...]
    notes: tuple[str, ...]
    parity: Parity


@dataclass(frozen=True, eq=False)
class Packed:
    """An artefact that was written and not yet loaded back; holds no model that came from files."""

    target: Target
    path: Path
    base: Base
    patches: tuple[str, ...]
    notes: tuple[str, ...]
    questions: Sequence[Question]
    expected: Observed

    def check(self, progress: Progress = silent) -> Shipped:
        """Load it back and ask it.

        Raises:
            InputError: it cannot be loaded, or reads the prompts as other tokens.
        """
        progress("loading it back", 0, 1)
        with torch.random.fork_rng(devices=[]):  # adapters are drawn before they are filled
            view = self.target.read(self.base, self.path)
        progress("loading it back", 1, 1)
        found = observe(view, self.target.asked(self.questions, self.path), progress=progress)
        all_ = not self.target.weights
        parity = compare(self.questions, self.expected, found, form=view.form, all_=all_)
        size = size_of(self.path)
        name, source = self.target.name, self.base.source
        return Shipped(name, self.path, size, source, self.patches, self.notes, parity)


def ship(
    model: EditedModel,
    patches: Sequence[Patch],
    target: str | Target,
    path: str | Path,
    *,
    tied: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Shipped:
    """Ship `patches` on `model`: write them, load them back, ask both. See `pack` for arguments.

    Holds a second model while it asks; `pack`, and then `check` when the first is gone, does not.
    """
    packed = pack(model, patches, target, path, tied=tied, force=force, progress=progress)
    return packed.check(progress)


def pack(
    model: EditedModel,
    patches: Sequence[Patch],
    target: str | Target,
    path: str | Path,
    *,
    tied: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Packed:
    """Write `patches` on `model` to `path`, whole or not at all, and ask the patched model.

    Args:
        model: what they were made for; given back as it was. What is live on it must be the first
            of them.
        patches: in order; a history's live list, say.
        target: merged, peft, gguf, gguf-lora or context, or one with options.
        path: a new folder or file.
        tied: names of tied parameters that may be changed all the same.
        force: replace what an earlier export wrote there.
        progress: told how far the work is.

    Raises:
        PatchError: a patch that does not fit, or cannot go there; the message says why.
        InputError: a place where something is; a model that cannot be written so.
    """
    target = target_called(target) if isinstance(target, str) else target
    path = Path(path)
    _check(model, patches, target, path, force=force)
    questions = questions_for(patches)
    cargo = Cargo(model, tuple(patches), path, progress)
    with (
        _live(cargo, tied) if target.weights else contextlib.nullcontext(),
        placed(path, folder=target.folder) as place,
    ):
        notes = target.write(cargo, place)
        if target.folder:
            (place / MARK).write_text(_recipe(cargo, target), encoding="utf-8")
        expected = observe(model.view, questions, progress=progress)
    ids = tuple(patch.id for patch in patches)
    return Packed(target, path, cargo.base, ids, tuple(notes), questions, expected)


def _check(
    model: EditedModel, patches: Sequence[Patch], target: Target, path: Path, *, force: bool
) -> None:
    if not patches:
        raise InputError("nothing to ship; give at least one patch")
    target.check(patches)
    if model.view.quantised:
        raise OptionError("ship from a model in float32 or bfloat16: 8-bit weights are not its own")
    if list(model.live) != list(patches)[: len(model.live)]:
        raise PatchError("the model carries live patches that are not the first of those to ship")
    check_place(path, folder=target.folder, force=force)
    identity = model.view.identity
    own = [str(place) for place in (identity.folder, identity.origin) if place]
    for place in map(Path, own):
        if path.exists() and place.exists() and path.samefile(place):
            raise InputError(f"{path}: is the model itself; name another place")


@contextlib.contextmanager
def _live(cargo: Cargo, tied: Sequence[str]) -> Iterator[None]:
    """All patches live within the block; those that were before stay so."""
    new = cargo.patches[len(cargo.model.live) :]
    with cargo.model.applied(*new, tied=tied):
        yield


def _recipe(cargo: Cargo, target: Target) -> str:
    """What an exported folder was made of, as JSON."""
    made = [
        {
            "id": patch.id,
            "method": patch.provenance.method,
            "requests": [
                {"prompt": request.prompt, "target": request.target}
                for request in patch.provenance.requests
            ],
        }
        for patch in cargo.patches
    ]
    facts = {
        "knowpatch": __version__,
        "to": target.name,
        "options": dataclasses.asdict(target),
        "model": cargo.base.source,
        "fingerprint": cargo.base.identity.fingerprint,
        "patches": made,
    }
    return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
