"""EditedModel: a base model and the ordered patches that live on it. The only writer of weights.

Two modes. Merged, for what one ships: the current tensor is the left fold, in float32, of the live
patches over the base bytes, rounded once to the tensor's type. Appending continues the fold;
dropping from the middle folds again from the base, never subtracts (subtraction does not give the
bytes back). With no live patch a tensor is its base, byte for byte, and the same live sequence on
the same machine gives the same bytes. Beside, for what one serves: within a session each row of a
batch carries patches of its own, computed next to weights that stay as they are. The two give the
same numbers (to 1e-4 in float32).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from knowpatch.deltas import WeightDelta
from knowpatch.errors import OptionError, PatchError
from knowpatch.fits import canonical_names, check_fits
from knowpatch.folding import folded, touched
from knowpatch.held import Carried, one_of, resolved
from knowpatch.models import load as load_model
from knowpatch.models.batch import last_columns
from knowpatch.models.beside import check_beside, repeats, session_of
from knowpatch.models.beside import session as beside_session
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.models.passes import Second
from knowpatch.models.view import ModelView
from knowpatch.parts.rules import read
from knowpatch.parts.spans import Encoded
from knowpatch.patch import Patch


class EditedModel:
    """A model with patches. Usable as the transformers model that it holds.

    Attributes:
        view: the model read by role, as edited so far.
        ready: what the method that edited last has at hand for the next edit (editing.py).
    """

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self._live: list[Patch] = []
        self._held: list[Patch] = []
        self._holding = threading.Lock()
        self._base: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor] = {}
        self._canonical = canonical_names(view.model)
        view.originals = self._base
        self.ready: Any = None

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

    def __call__(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's forward pass, with wraps and sessions. Prompt rules act in `generate`, `ask`.

        The prompt of a row is taken to be all of it; a pass on top of `past_key_values` goes on
        from a prompt that was read before.
        """
        if input_ids is None:
            if any(session_of(self.model)) or self.view.standing:
                raise OptionError("give input_ids: what patches do beside the model needs them")
            return self.view.model(**kwargs)
        past = kwargs.get("past_key_values")
        going_on = past is not None and past.get_seq_length() > 0
        lasts = None if going_on else last_columns(input_ids, kwargs.get("attention_mask"))
        with self.view.passing(lasts, rows=len(input_ids)):
            return self.view.model(input_ids, **kwargs)

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """transformers' `generate`, with wraps, sessions, and prompt rules in front of each row.

        Rows may be padded on either side. What comes back starts with the given `input_ids`.
        """
        mask = kwargs.pop("attention_mask", torch.ones_like(input_ids))
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        session = session_of(self.model)
        times = repeats(session, len(rows))
        for number, row in enumerate(rows):
            carried = session[number // times]
            if any(patch.procedure for patch in (*self._live, *carried)):
                raise OptionError("a patch in force answers by a procedure: use `ask`, not ids")
            if any(patch.rule for patch in (*self._live, *carried)):
                rows[number] = list(self.encode(self.view.decode(row), patches=carried).ids)
        batch = self.view.batch(rows, side="left")
        width = batch.ids_BT.shape[1]
        with self.view.passing([width - 1] * len(rows)):
            out: Any = self.view.model.generate(
                batch.ids_BT, attention_mask=batch.mask_BT, **kwargs
            )
        if not isinstance(out, Tensor):  # return_dict_in_generate: as transformers gives it
            return out  # type: ignore[no-any-return]
        copies = len(out) // len(rows)
        return torch.cat([input_ids.repeat_interleave(copies, 0), out[:, width:]], dim=1)

    def encode(
        self, prompt: str, *, chat: bool = False, patches: Sequence[Patch] | None = None
    ) -> Encoded:
        """The ids that `readings` gives; OptionError if there are two, which only `ask` can mix."""
        encoded, second = self.readings(prompt, chat=chat, patches=patches)
        if second is not None:
            raise OptionError("a patch in force mixes two readings of a question: use `ask`")
        return encoded

    def readings(
        self, prompt: str, *, chat: bool = False, patches: Sequence[Patch] | None = None
    ) -> tuple[Encoded, Second | None]:
        """A question as the live prompt rules and those of `patches` rewrite it (by default those
        of this context's session), with its second reading where a rule wants one."""
        carried = self.carried() if patches is None else patches
        return read((*self._live, *carried), prompt, self.view, chat=chat)

    def ask(self, prompt: str, *, max_new_tokens: int = 24, chat: bool = False) -> str:
        """The model's greedy answer, as text."""
        from knowpatch.ask import Ask  # which asks an EditedModel

        said = Ask(self).generate(prompt, max_new_tokens=max_new_tokens, chat=chat)
        return said.result().text.strip()

    # -- patches -----------------------------------------------------------------------------------

    @property
    def live(self) -> tuple[Patch, ...]:
        """The live patches, in the order in which they were applied."""
        return tuple(self._live)

    def carried(self) -> tuple[Patch, ...]:
        """What a single question carries in this context's session.

        Raises:
            OptionError: the session has several rows; questions come one at a time.
        """
        rows = session_of(self.model)
        if len(rows) > 1:
            raise OptionError(
                f"a session of {len(rows)} rows is for batches of as many rows: ask single "
                "questions in a session of one row"
            )
        return rows[0]

    def hold(self, patch: Patch) -> str:
        """Keep `patch` at hand for sessions, without applying it; returns its id.

        Raises:
            ForeignModelError, PatchError: it does not fit, or cannot be computed beside the model.
        """
        with self._holding:
            if patch not in self._held:
                check_fits(patch, self.view, self._canonical)
                check_beside(patch, self.model, self.view.roles.head)
                self._held.append(patch)
        return patch.id

    def release(self, patch_id: str) -> None:
        """Forget a patch that `hold` or a session keeps at hand."""
        self._held.remove(one_of(self._held, patch_id, "held"))

    @contextlib.contextmanager
    def session(self, rows: Sequence[Carried]) -> Iterator[EditedModel]:
        """Within the block, in this thread or task alone, row i of a batch carries rows[i].

        Patches that are live act on every row as well. A session of one row is for every row of
        any batch; else a batch has as many rows, or a multiple (n adjacent ones for each).

        Args:
            rows: for each row a patch, the id of a held one, several of them, or None.

        Raises:
            OptionError: an unknown id; PatchError: a patch that is live, or cannot be carried.
        """
        if not rows:
            raise OptionError("a session of no rows was given; give at least one, [None] for none")
        with beside_session(self.model, tuple(self.carry(row) for row in rows)):
            yield self

    def carry(self, row: Carried) -> tuple[Patch, ...]:
        """The patches of one row of a session, held from now on; errors as in `session`."""
        for patch in (patches := resolved(row, self._held, self._live)):
            self.hold(patch)
        return patches

    def apply(self, patch: Patch, *, tied: Sequence[str] = ()) -> None:
        """Make `patch` live, behind the patches that are live already; whole or not at all.

        Args:
            patch: what to apply.
            tied: names of tied parameters that may be changed all the same (an output head that
                is also the token embedding changes both).

        Raises:
            ForeignModelError: made for another model; PatchError: already live, or does not fit.
        """
        with self.view.lock:  # another thread's pass sees all of it or nothing
            if patch in self._live:
                raise PatchError(f"patch {patch.id[:12]} is already applied")
            check_fits(patch, self.view, self._canonical, tied)
            if self.view.quantised and patch.deltas:
                raise PatchError(
                    f"the weights of {self.view.source} are in 8 bits and cannot be rewritten: "
                    "carry the patch in a session, or load the model in float32 or bfloat16"
                )
            grown = {
                name: folded(self._current(name), [patch], name, self._canonical)
                for name in self._touched(patch)
            }
            for name, wide in grown.items():
                self._write(name, wide)
            self._set_live([*self._live, patch])

    def _set_live(self, patches: list[Patch]) -> None:
        self._live = patches
        self.view.standing = tuple(patch for patch in patches if patch.wraps)

    def drop(self, *patch_ids: str) -> None:
        """Take live patches back; the others stay, as if these had never been applied.

        Raises:
            OptionError: no live patch has this id (a unique beginning of it is enough).
        """
        with self.view.lock:
            gone = [one_of(self._live, patch_id, "live") for patch_id in patch_ids]
            self._set_live([patch for patch in self._live if patch not in gone])
            for name in self._touched(*gone):
                rest = [patch for patch in self._live if name in self._touched(patch)]
                if rest:
                    self._write(name, folded(self._base[name], rest, name, self._canonical))
                else:
                    self._store(name, self._base[name])
                    del self._base[name]
                    self._wide.pop(name, None)

    @contextlib.contextmanager
    def applied(self, *patches: Patch, tied: Sequence[str] = ()) -> Iterator[EditedModel]:
        """`patches` live within the block, and taken back after it; `tied` as in `apply`.

        On quantised weights, which cannot be rewritten, they are carried beside instead.
        """
        with self.growing(tied=tied) as add:
            for patch in patches:
                add(patch)
            yield self

    @contextlib.contextmanager
    def growing(self, *, tied: Sequence[str] = ()) -> Iterator[Callable[[Patch], None]]:
        """A function that puts patches on top of the live ones, until the block ends."""
        done: list[str] = []
        with contextlib.ExitStack() as beside:

            def add(patch: Patch) -> None:
                if self.view.quantised:
                    beside.enter_context(self.session([[*self.carried(), patch]]))
                else:
                    self.apply(patch, tied=tied)
                    done.append(patch.id)

            try:
                yield add
            finally:
                self.drop(*done)

    def trying(self, deltas: Sequence[WeightDelta]) -> contextlib.AbstractContextManager[None]:
        """Compute as if `deltas` had been applied, without writing a weight."""
        return self.view.trying(deltas)

    def digests(self, *patches: Patch) -> dict[str, str]:
        """The hashes of the tensors that patches touch, as they stand now."""
        return {name: tensor_digest(self.view.values(name)) for name in self._touched(*patches)}

    # -- the fold ----------------------------------------------------------------------------------

    def _touched(self, *patches: Patch) -> list[str]:
        return touched(patches, self._canonical)

    def _current(self, name: str) -> Tensor:
        """The fold so far, float32."""
        return self._wide.get(name, self.view.parameter(name).detach()).float()

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
