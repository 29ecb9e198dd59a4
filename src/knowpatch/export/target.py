"""What a target is: a form in which patches leave knowpatch, written and read back."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from knowpatch.edited import EditedModel
from knowpatch.errors import ModelError, PatchError
from knowpatch.export.parity import Question
from knowpatch.fits import beyond_weights, canonical_names
from knowpatch.folding import folded, touched
from knowpatch.models.checkpoint import Checkpoint
from knowpatch.models.fingerprint import Identity
from knowpatch.models.load import load as load_view
from knowpatch.models.view import ModelView
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent


@dataclass(frozen=True)
class Base:
    """The unedited model, as it can be had once more to put an artefact on.

    Attributes:
        identity: what it is and where it is from.
        source: its name for messages.
        device, form: where and in which numbers it computes.
        memory: the model and its tokenizer, where it is nowhere else.
    """

    identity: Identity
    source: str
    device: str
    form: str
    memory: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, view: ModelView) -> Base:
        memory = None if view.identity.folder else (view.model, view.tokenizer)
        return cls(view.identity, view.source, str(view.device.type), view.form, memory)

    def load(self) -> ModelView:
        """A copy of its own, that may be changed."""
        if self.memory is not None:
            return plain_view(copy.deepcopy(self.memory[0]), self.memory[1])
        return load_view(str(self.identity.folder), device=self.device, dtype=self.form)

    @property
    def gguf(self) -> Path:
        """The GGUF file that it was loaded from; ModelError if it was not."""
        if self.identity.folder is None or not self.identity.origin.lower().endswith(".gguf"):
            raise ModelError(
                f"{self.source} was not loaded from a GGUF file, so there is none to write into: "
                "edit and export with --model FILE.gguf"
            )
        return Path(self.identity.origin)


@dataclass(frozen=True)
class Cargo:
    """Patches on the model that they were made for.

    Attributes:
        model: the model; while an artefact with weights is written, the patches are live on it.
        patches: in order.
        path: where the artefact will be.
        progress: told how far the work is.
    """

    model: EditedModel
    patches: tuple[Patch, ...]
    path: Path
    progress: Progress = field(default=silent, compare=False)

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        return canonical_names(self.model.model)

    @cached_property
    def base(self) -> Base:
        return Base.of(self.model.view)

    @cached_property
    def changed(self) -> list[str]:
        """The parameters that the patches change, each once."""
        return touched(self.patches, self.canonical)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The model's own safetensors files, where it has any."""
        folder = self.base.identity.folder
        found = None if folder is None else Checkpoint(folder)
        return found if found and found.shards else None

    def unedited(self, name: str) -> Tensor:
        """A parameter as it came, in the model's own type."""
        view = self.model.view
        return view.originals.get(name, view.values(name)).detach().cpu()

    def folded(self, start: Tensor, name: str) -> Tensor:
        """The parameter `name` under the patches, float32, from a stored tensor."""
        on_cpu = start.cpu()
        return folded(on_cpu, self.patches, name, self.canonical)


@dataclass(frozen=True)
class Target(ABC):
    """A form to ship in; its fields are its options.

    Class attributes:
        name: as on the command line.
        about: what is written, one line.
        reader: who loads it back.
        folder: whether it is a folder, not a file.
        weights: whether it carries weight changes, which the patched model is the measure of; else
            the unedited model is.
        stored: whether the model is loaded in the type of its checkpoint (else as `auto` says).
    """

    name: ClassVar[str]
    about: ClassVar[str]
    reader: ClassVar[str]
    folder: ClassVar[bool] = False
    weights: ClassVar[bool] = True
    stored: ClassVar[bool] = False

    @classmethod
    def refuses(cls, patch: Patch) -> str | None:
        """Why a patch cannot go there; None where it can."""
        what = beyond_weights(patch)
        if what is None and not patch.deltas:
            return "changes no weight"
        return None if what is None else f"{what}, which no weight can carry"

    def check(self, patches: Sequence[Patch]) -> None:
        """PatchError, in one line, if one of the patches cannot go there."""
        for patch in patches:
            if reason := self.refuses(patch):
                raise PatchError(
                    f"patch {patch.id[:12]} ({patch.provenance.method}) cannot be shipped as "
                    f"{self.name}: it {reason}; serve it with knowpatch, or see: "
                    "knowpatch export --table"
                )

    @abstractmethod
    def write(self, cargo: Cargo, place: Path) -> list[str]:
        """Write the artefact to `place` (an empty folder, or a file); returns what to know of it.

        Raises:
            InputError: the model, or its patches together, cannot be shipped so.
        """

    @abstractmethod
    def read(self, base: Base, path: Path) -> ModelView:
        """Load the artefact, on the unedited model where it needs one."""

    def asked(self, questions: Sequence[Question], path: Path) -> list[Question]:
        """Questions as they are put to the artefact."""
        return list(questions)


def plain_view(model: Any, tokenizer: Any, device: str = "cpu") -> ModelView:
    """A view of a model that is only asked, so that nothing of it need be hashed."""
    return ModelView(model.to(device).eval(), tokenizer, Identity("", {}))
