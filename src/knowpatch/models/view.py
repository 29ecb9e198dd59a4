"""ModelView: a model read by role.

It runs rows of token ids, captures what passes through a module, scores and generates, and adds
trial changes functionally. It never writes a weight and leaves no hook, mode, gradient or random
state changed. Axes: B rows, T columns, M asked places, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.func import functional_call

from knowpatch.deltas import WeightDelta
from knowpatch.errors import OptionError
from knowpatch.models import trials
from knowpatch.models.batch import Batch, Place, Side
from knowpatch.models.beside import Beside, repeats, session_of
from knowpatch.models.fingerprint import Identity
from knowpatch.models.hooks import (
    Hook,
    Reached,
    as_found,
    choosing,
    seeing_nothing,
    shifting,
    tapping,
)
from knowpatch.models.limits import Limits
from knowpatch.models.passes import Ids, Run, Scored, Shift, Tap
from knowpatch.models.past import Past
from knowpatch.models.quant import EIGHT, plain
from knowpatch.models.roles import LinearRole, Roles, find_roles
from knowpatch.models.sampling import Mixed, Sampled, ended, endings, greedily, processors
from knowpatch.models.sites import Kept, needs_whole
from knowpatch.parts.prompts import encode_prompt
from knowpatch.parts.spans import Encoded
from knowpatch.patch import Patch

S = TypeVar("S", bound=Scored)


@dataclass
class ModelView:
    """A model, its tokenizer, and where things sit in it. Remembers no edits.

    Attributes:
        model: a transformers causal language model.
        tokenizer: its tokenizer, a fast one.
        identity: fingerprint and tensor hashes.
        originals: tensors as they came, by parameter name, kept by whoever changes the model.
        standing: live patches with wraps, which every row of every pass carries.
        padding: side on which `run` pads.
        source: what the model was loaded from, for messages.
        form: the form that its numbers have: a dtype, or how it is quantised.
    """

    model: Any
    tokenizer: Any
    identity: Identity
    source: str = "a model in memory"
    form: str = ""
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    standing: Sequence[Patch] = ()
    padding: Side = "right"

    def __post_init__(self) -> None:
        self.roles: Roles = find_roles(self.model)
        # One pass at a time: hooks sit on modules that all threads share.
        self.lock = threading.RLock()
        self.form = self.form or str(self.embedding.dtype).removeprefix("torch.")
        self.probed: dict[object, str | None] = {}
        self.kept = Kept()

    @property
    def embedding(self) -> nn.Parameter:
        return self.parameter(f"{self.roles.embedding}.weight")

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def quantised(self) -> bool:
        return self.form == EIGHT

    @property
    def vocabulary(self) -> int:
        """V, rows of the token embedding."""
        return int(self.embedding.shape[0])

    @property
    def limits(self) -> Limits:
        return Limits.of(self.model.config, self.embedding.dtype)

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter called `name`, as it stands in the model (and not in a pass's trial)."""
        with self.lock:
            found: nn.Parameter = self.model.get_parameter(name)
        return found

    def values(self, name: str) -> Tensor:
        """The numbers of the parameter called `name`, detached."""
        return plain(self.parameter(name))

    def weight(self, role: LinearRole) -> Tensor:
        """The weight of a linear map as edited so far, trials included: (out, in), float32."""
        return self._oriented(role, self._tried(role.address.parameter))

    def base(self, role: LinearRole) -> Tensor:
        """The weight of a linear map as it came: (out, in), float32."""
        name = role.address.parameter
        return self._oriented(role, self.originals.get(name, self.values(name)))

    def _oriented(self, role: LinearRole, stored: Tensor) -> Tensor:
        return role.oriented(role.address.narrow(stored)).float()

    def _tried(self, name: str) -> Tensor:
        stored = self.values(name)
        whole = stored
        for delta in trials.of(self):
            if delta.address.parameter == name:
                whole = delta.added_to(whole)
        return whole.to(stored.dtype)

    def stand_in(self, dtype: torch.dtype | None) -> Callable[[nn.Parameter], Tensor]:
        """What stands for each parameter in a twin: its value with trials, in `dtype` if given.

        A quantised model computes in the dtype that it was loaded for.
        """
        names = {delta.address.parameter for delta in trials.of(self)}
        tried = {id(self.parameter(name)): self._tried(name) for name in names}

        def weight(parameter: nn.Parameter) -> Tensor:
            value = tried.get(id(parameter), parameter).detach()
            narrowed = dtype and not self.quantised and value.is_floating_point()
            return value.to(dtype) if narrowed else value

        return weight

    def trying(self, deltas: Sequence[WeightDelta]) -> contextlib.AbstractContextManager[None]:
        """Within the block, and this context, the model computes as if `deltas` had been applied.

        The deltas may hold float32 leaves that require grad; the model's own weights never do.
        """
        return trials.trying(self, deltas)

    @property
    def has_chat(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(
        self, prompt: str, *, chat: bool = False, before: str = "", system: str | None = None
    ) -> Encoded:
        """A prompt as ids: as it is (without blanks at its end), or as the user's turn of a chat.

        Args:
            prompt: the user's own words.
            chat: frame them with the tokenizer's chat template, ready for the answer.
            before: text put in front of the prompt.
            system: the system turn, with `chat`.
        """
        if chat and not self.has_chat:
            raise OptionError(
                f"the tokenizer of {self.source} has no chat template: ask without chat"
            )
        try:
            return encode_prompt(self.tokenizer, prompt, chat=chat, before=before, system=system)
        except TemplateError as error:  # a template may refuse: Gemma's knows no system turn
            raise OptionError(f"the chat template of {self.source} refuses: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer; the tokenizer's own first."""
        ids = [self.tokenizer.eos_token_id]
        given = getattr(self.model.generation_config, "eos_token_id", None)
        ids += given if isinstance(given, list) else [given]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def batch(self, rows: Sequence[Sequence[int]], side: Side | None = None) -> Batch:
        self.limits.check(max(len(row) for row in rows), self.source)
        pad = self.tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        return Batch.of(rows, pad=pad, side=side or self.padding, device=self.device)

    def read(self, rows: Sequence[Sequence[int]]) -> Past:
        """The past of rows that are the beginnings of others: no prompt ends in them."""
        hooks = [seeing_nothing(self.model.get_submodule(self.roles.head))]
        with self.passing(None, hooks, rows=len(rows)):
            return Past.nothing(len(rows), self.device).read(self._forward, rows)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        *,
        logits_at: Sequence[Place] = (),
        taps: Sequence[Tap] = (),
        shifts: Sequence[Shift] = (),
        grad: bool = False,
        prompts: Sequence[int] | None = None,
        past: Past | None = None,
    ) -> Run:
        """One pass over `rows` of ids.

        Args:
            rows: token ids, one sequence a row.
            prompts: how many of each row's ids are its prompt; by default all.
            past: what was read before the rows; it is used up.
            logits_at: places whose next-token logits are wanted; the head runs only there. With
                none, the pass ends as soon as every tap has been seen.
            taps: what to capture.
            shifts: what to add on the way.
            grad: build a graph, for the leaves of shifts and trials.
        """
        batch = self.batch(rows)
        tapped: dict[Tap, Tensor] = {}
        part = self.model.get_submodule
        hooks = [shifting(part(shift.module), batch, shift) for shift in shifts]
        for tap in taps:
            last = None if logits_at else len(taps)
            hooks.append(tapping(part(tap.module), batch, tap, tapped, last))
        hooks.append(choosing(part(self.roles.head), batch, logits_at))
        logits = torch.empty(0)
        ends = [len(row) for row in rows] if prompts is None else prompts
        seen = 0 if past is None else past.columns
        lasts = [seen + start + end - 1 for start, end in zip(batch.starts, ends, strict=True)]
        with self.passing(lasts, hooks), torch.set_grad_enabled(grad), contextlib.suppress(Reached):
            if past is not None:
                longest = int((past.mask_BP.sum(1) + batch.mask_BT.sum(1)).max())
                self.limits.check(longest, self.source)
            inputs = batch.inputs() if past is None else past.inputs(batch)
            logits = self._forward(**inputs, use_cache=False).logits.float()
        return Run(batch, logits, tapped)

    def _forward(self, **inputs: Any) -> Any:
        names = {delta.address.parameter for delta in trials.of(self)}
        if not names:
            return self.model(**inputs)
        return functional_call(self.model, {name: self._tried(name) for name in names}, (), inputs)

    @contextlib.contextmanager
    def passing(
        self, lasts: Sequence[int] | None, hooks: Sequence[Hook] = (), *, rows: int = 0
    ) -> Iterator[None]:
        """A pass or a generation, with `hooks` and what this context carries beside; everything is
        as it was after the block, and no other thread passes meanwhile.

        Args:
            lasts: for each row of the batch the column of its last prompt token, a past's columns
                included; None for beginnings, whose prompts end later.
            hooks: what else to register.
            rows: of the batch, where `lasts` does not say.
        """
        repeats(session_of(self.model), rows if lasts is None else len(lasts))
        with self.lock, as_found(self.model, [*self.beside(lasts).hooks(), *hooks]):
            yield

    def beside(self, lasts: Sequence[int] | None, *, model: Any = None) -> Beside:
        """What this context carries beside the model (or beside a twin of it)."""
        on = self.model if model is None else model
        return Beside(on, session_of(self.model), self.standing, lasts, self.kept)

    @property
    def carried(self) -> tuple[Patch, ...]:
        """All patches that act beside the model in this context, on whatever row."""
        return (*self.standing, *(patch for row in session_of(self.model) for patch in row))

    def reads_in_pieces(
        self, longest: int, pieces: int, patches: Sequence[Patch] | None = None
    ) -> bool:
        """Whether rows of this length, which carry `patches` (by default those of this context),
        may be read in so many pieces, each padded."""
        carried = self.carried if patches is None else (*self.standing, *patches)
        return self.limits.reads_in_pieces(longest, pieces) and not needs_whole(carried)

    def score(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        give: type[S] = Scored,  # type: ignore[assignment]
        *,
        past: Past | None = None,
    ) -> list[S]:
        """Force each answer behind its prompt (and behind `past`), in one batch; both as ids."""
        rows = [[*prompt, *answer[:-1]] for prompt, answer in pairs]
        places = [
            (row, len(prompt) - 1 + i)
            for row, (prompt, answer) in enumerate(pairs)
            for i in range(len(answer))
        ]
        prompts = [len(prompt) for prompt, _ in pairs]
        logits_MV = self.run(rows, logits_at=places, prompts=prompts, past=past).logits_MV
        return give.of(logits_MV, [answer for _, answer in pairs])

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampled: Sampled | Mixed | None = None,
        whole: bool = False,
        until: Sequence[str] = (),
        past: Past | None = None,
    ) -> list[Ids]:
        """Continue each row, greedily or as `sampled` says.

        `past` is what was read of a beginning that all rows share.
        Returns the new ids of each row, up to and with the first one that ends an answer, or that
        brings one of the texts in `until`; with `whole`, all that were asked for, endings being
        ignored.
        """
        if trials.of(self):
            raise OptionError("a trial is for single passes: apply a patch to generate with it")
        self.limits.check(max(len(row) for row in rows) + max_new_tokens, self.source)
        seen = 0 if past is None else past.columns
        head = [row[:seen] for row in rows]
        batch = self.batch([row[seen:] for row in rows], side="left")
        ids_BT = torch.cat([torch.tensor(head, dtype=torch.long).to(batch.ids_BT), batch.ids_BT], 1)
        mask_BT = batch.mask_BT if past is None else torch.cat([past.mask_BP, batch.mask_BT], 1)
        pad = self.tokenizer.pad_token_id or 0
        with self.passing([ids_BT.shape[1] - 1] * len(rows)), torch.no_grad():
            out = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                past_key_values=None if past is None else past.cache,
                generation_config=greedily(max_new_tokens, pad, self.stop_ids, whole=whole),
                logits_processor=processors(sampled),
                stopping_criteria=endings(until, self.decode, ids_BT.shape[1]),
            )
        new: list[list[int]] = out[:, ids_BT.shape[1] :].tolist()
        if whole:
            return [tuple(row) for row in new]
        return [ended(row, self.stop_ids, until, self.decode) for row in new]
