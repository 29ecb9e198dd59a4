"""EditedModel: a base model and the ordered patches that live on it. The only writer of weights.

Merged mode: the current tensor is the left fold, in float32, of the live patches over the base
bytes, rounded once to the tensor's type. Appending continues the fold; dropping from the middle
folds again from the base, never subtracts (subtraction does not give the bytes back). With no live
patch a tensor is its base, byte for byte, and the same live sequence on the same machine gives the
same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowpatch.deltas import WeightDelta, is_finite
from knowpatch.errors import ForeignModelError, OptionError, PatchError
from knowpatch.files import replacing
from knowpatch.models import load as load_model
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.models.gguf import quiet_transformers
from knowpatch.models.view import ModelView
from knowpatch.parts.rules import check_rule, render
from knowpatch.parts.spans import Encoded
from knowpatch.patch import Patch
from knowpatch.progress import Progress, silent


class EditedModel:
    """A model with patches. Usable as the transformers model that it holds.

    Attributes:
        view: the model read by role, as edited so far.
    """

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self._live: list[Patch] = []
        self._base: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor] = {}
        self._canonical = _canonical_names(view.model)
        view.originals = self._base

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> EditedModel:
        """Edit a transformers model that is already in memory."""
        return cls(load_model.wrap(model, tokenizer))

    # -- as an ordinary model ----------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The transformers model, with the live weight changes in it."""
        return self.view.model

    @property
    def tokenizer(self) -> Any:
        return self.view.tokenizer

    def __getattr__(self, name: str) -> Any:
        if name in ("view", "_live"):  # not yet set: copying or unpickling
            raise AttributeError(name)
        return getattr(self.view.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass. Prompt rules act where prompts are: `generate` and `ask`."""
        return self.view.model(*args, **kwargs)

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """transformers' `generate`, with live prompt rules put in front of each row.

        What comes back starts with the given `input_ids`, as without rules.
        """
        if not self._rules():
            out: Tensor = self.view.model.generate(input_ids, **kwargs)
            return out
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        texts = [
            self.view.decode(r[m.bool()].tolist()) for r, m in zip(input_ids, mask, strict=True)
        ]
        batch = self.view.batch([self.encode(text).ids for text in texts], side="left")
        out = self.view.model.generate(batch.ids_BT, attention_mask=batch.mask_BT, **kwargs)
        new = out[:, batch.ids_BT.shape[1] :]
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)

    def encode(self, prompt: str, *, chat: bool = False) -> Encoded:
        """A question as ids, rewritten by the live prompt rules."""
        before, system = "", None
        for rule in self._rules():
            around = render(rule, prompt, chat=chat)
            before += around.before
            system = around.system if system is None else system
        return self.view.encode(prompt, chat=chat, before=before, system=system)

    def ask(self, prompt: str, *, max_new_tokens: int = 24, chat: bool = False) -> str:
        """The model's greedy answer, as text."""
        row = self.encode(prompt, chat=chat).ids
        return self.view.decode(self.view.generate([row], max_new_tokens=max_new_tokens)[0]).strip()

    # -- patches -----------------------------------------------------------------------------------

    @property
    def live(self) -> tuple[Patch, ...]:
        """The live patches, in the order in which they were applied."""
        return tuple(self._live)

    def _rules(self) -> list[Any]:
        return [patch.rule for patch in self._live if patch.rule is not None]

    def apply(self, patch: Patch, *, tied: Sequence[str] = ()) -> None:
        """Make `patch` live, behind the patches that are live already; whole or not at all.

        Args:
            patch: what to apply.
            tied: names of tied parameters that may be changed all the same (an output head that
                is also the token embedding changes both).

        Raises:
            ForeignModelError: made for another model; PatchError: already live, or does not fit.
        """
        if patch in self._live:
            raise PatchError(f"patch {patch.id[:12]} is already applied")
        self._check(patch, tied)
        grown = {
            name: self._fold(self._current(name), [patch], name) for name in self._touched(patch)
        }
        for name, wide in grown.items():
            self._write(name, wide)
        self._live.append(patch)

    def drop(self, patch_id: str) -> None:
        """Take a live patch back; the others stay, as if it had never been applied.

        Raises:
            OptionError: no live patch has this id (a unique beginning of it is enough).
        """
        found = [patch for patch in self._live if patch.id.startswith(patch_id)]
        if len(found) != 1 or not patch_id:
            live = ", ".join(patch.id[:12] for patch in self._live) or "none"
            raise OptionError(f"no single live patch has id {patch_id!r}; live: {live}")
        self._live.remove(found[0])
        for name in self._touched(found[0]):
            rest = [patch for patch in self._live if name in self._touched(patch)]
            if rest:
                self._write(name, self._fold(self._base[name].float(), rest, name))
            else:
                self._store(name, self._base[name])
                del self._base[name]
                self._wide.pop(name, None)

    @contextlib.contextmanager
    def applied(self, *patches: Patch) -> Iterator[EditedModel]:
        """`patches` live within the block, and taken back after it."""
        done: list[Patch] = []
        try:
            for patch in patches:
                self.apply(patch)
                done.append(patch)
            yield self
        finally:
            for patch in reversed(done):
                self.drop(patch.id)

    def trying(self, deltas: Sequence[WeightDelta]) -> contextlib.AbstractContextManager[None]:
        """Compute as if `deltas` had been applied, without writing a weight."""
        return self.view.trying(deltas)

    def save(self, folder: str | Path, *, progress: Progress = silent) -> Path:
        """Write the model with its live weight changes as a folder that transformers loads.

        Written beside and renamed, so that no half-written folder is ever left.

        Raises:
            PatchError: a live patch holds a prompt rule, which merged weights cannot carry.
        """
        for patch in self._live:
            if patch.rule is not None:
                raise PatchError(
                    f"patch {patch.id[:12]} ({patch.provenance.method}) is a prompt rule and "
                    "changes no weight: it cannot be merged; "
                    "put its text in front of your prompts instead"
                )
        folder = Path(folder)
        stage = f"writing {folder.name}"
        with replacing(folder, folder=True) as temporary, quiet_transformers():
            progress(stage, 0, 1)
            self.view.model.save_pretrained(temporary)
            self.view.tokenizer.save_pretrained(temporary)
            progress(stage, 1, 1)
        return folder

    def digests(self, patch: Patch) -> dict[str, str]:
        """The hashes of the tensors that `patch` touches, as they stand now."""
        return {name: tensor_digest(self.view.parameter(name)) for name in self._touched(patch)}

    # -- the fold ----------------------------------------------------------------------------------

    def _touched(self, patch: Patch) -> list[str]:
        names = (self._canonical[delta.address.parameter] for delta in patch.deltas)
        return list(dict.fromkeys(names))

    def _current(self, name: str) -> Tensor:
        """The fold so far, float32."""
        return self._wide.get(name, self.view.parameter(name).detach()).float()

    def _fold(self, start: Tensor, patches: Sequence[Patch], name: str) -> Tensor:
        wide = start
        for patch in patches:
            for delta in patch.deltas:
                if self._canonical[delta.address.parameter] == name:
                    wide = delta.added_to(wide)
        if not is_finite(wide):
            raise PatchError(f"applying the patch would make {name} not finite")
        return wide

    def _write(self, name: str, wide: Tensor) -> None:
        parameter = self.view.parameter(name)
        if name not in self._base:
            self._base[name] = parameter.detach().clone()
        if parameter.dtype != torch.float32:
            self._wide[name] = wide
        self._store(name, wide)

    def _store(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.view.parameter(name).copy_(value)

    # -- checks ------------------------------------------------------------------------------------

    def _check(self, patch: Patch, tied: Sequence[str]) -> None:
        made_for, mine = patch.provenance.fingerprint, self.view.fingerprint
        if made_for != mine:
            raise ForeignModelError(
                f"patch {patch.id[:12]} was made for the model with fingerprint {made_for[:16]}, "
                f"{self.view.source} has {mine[:16]}; load the model it was made for"
            )
        if patch.rule is not None:
            check_rule(patch.rule)
        for delta in patch.deltas:
            self._check_delta(delta, tied)

    def _check_delta(self, delta: WeightDelta, tied: Sequence[str]) -> None:
        name = delta.address.parameter
        if name not in self._canonical:
            raise PatchError(f"the patch changes {name!r}, which {self.view.source} does not have")
        delta.check(tuple(self.view.parameter(name).shape))
        shared = [
            other for other, first in self._canonical.items() if first == self._canonical[name]
        ]
        if len(shared) > 1 and name not in tied:
            raise PatchError(
                f"{name} is tied ({' = '.join(shared)}): changing it changes all of them; "
                f"allow it by name: tied=[{name!r}]"
            )
        stored = self.view.identity.stored_digest(name)
        if delta.base and stored and stored != delta.base:
            raise ForeignModelError(
                f"the stored tensor {name} of {self.view.source} ({stored[:16]}) is not the one "
                f"the patch was made on ({delta.base[:16]})"
            )


def _canonical_names(model: Any) -> dict[str, str]:
    """Each parameter's name to the first name of the same storage, so that tied ones are one."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = (parameter.data_ptr(), tuple(parameter.shape))
        names[name] = first.setdefault(key, name) if parameter.numel() else name
    return names
