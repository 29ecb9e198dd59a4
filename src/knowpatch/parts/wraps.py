"""What a patch does while the model runs, as data: what a kind of wrap is, and how several join.

A wrap acts on what one module puts out. A patch names its kind ("name@version") and holds its data;
the code is in the library (one file of parts/kinds) or in a package that registers it, so a patch
file never brings code. Kinds differ in what they decide by and in where they act:

    reads   last     what enters a module at the prompt's last token; one decision for each row
            prompt   all of the prompt; one decision for each row
            token    each token by itself; nothing is decided for a row
    acts    last     at the prompt's last token
            prompt   where the prompt is read
            all      at every token, those of the answer included

Axes: B rows, T columns, I and D input and output size of the module, N entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from knowpatch.errors import OptionError, PatchError, not_apart
from knowpatch.patch import Wrap
from knowpatch.registry import Registry

Site = Literal["map", "feed-forward"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a pass shows a wrap of some rows.

    Attributes:
        inputs_BTI: what enters the module.
        ids_BT: token ids.
        prompt_BT: which tokens are the prompt's; padding and the answer are not.
        first_BT: which token begins its text: many models keep something of their own there.
    """

    inputs_BTI: Tensor
    ids_BT: Tensor
    prompt_BT: Tensor
    first_BT: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> Tokens:
        """One token of each of these rows, (B, 1)."""
        return self._map(lambda tensor: tensor[rows, columns][:, None])

    def of(self, rows: Tensor) -> Tokens:
        """These rows."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, pick: Any) -> Tokens:
        return Tokens(*map(pick, (self.inputs_BTI, self.ids_BT, self.prompt_BT, self.first_BT)))

    @property
    def last_BI(self) -> Tensor:
        """What enters at the prompt's last token, float32."""
        places_BT = self.prompt_BT.long().cumsum(1).argmax(1)
        return self.inputs_BTI[torch.arange(len(places_BT)), places_BT].float()

    def mean_BI(self, share: float = 1.0) -> Tensor:
        """The mean over the last ceil(share n) of a prompt's n tokens, float32."""
        count_B1 = self.prompt_BT.sum(1, keepdim=True)
        behind_BT = count_B1 - self.prompt_BT.long().cumsum(1)  # of the prompt, behind each token
        wanted_B1 = (share * count_B1 - 1e-6).ceil().clamp(min=1)
        picked_BT = (self.prompt_BT & (behind_BT < wanted_B1)).float()
        total_BI = (picked_BT[:, None] @ self.inputs_BTI.float())[:, 0]
        return total_BI / picked_BT.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, eq=False)
class Decision:
    """What each row (B), or each token (B, T), will do.

    Attributes:
        entries: number of the entry that answers, -1 for none.
        scores: of the nearest entry; thresholds: that it was held against.
        nearest: the nearest entry, whether it answers or not.
    """

    entries: Tensor
    scores: Tensor
    thresholds: Tensor
    nearest: Tensor

    def of(self, rows: Tensor) -> Decision:
        return Decision(*(each[rows] for each in vars(self).values()))

    @classmethod
    def above(cls, scores: Tensor, nearest: Tensor, threshold: float | Tensor) -> Decision:
        """An entry answers where its score is above a threshold."""
        limits = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
        limits = limits.expand_as(scores)
        return cls(torch.where(scores > limits, nearest, -1), scores, limits, nearest)


class Kind(ABC):
    """Wraps of one kind on one module, as one.

    Class attributes:
        kind: "name@version"; the file's stem is the name.
        reads, acts: see the module.
        site: whether it sits on a linear map or on a whole MLP.
        measure: what its scores are, for people.
    """

    kind: ClassVar[str]
    reads: ClassVar[Literal["last", "prompt", "token"]]
    acts: ClassVar[Literal["last", "prompt", "all"]]
    site: ClassVar[Site] = "map"
    measure: ClassVar[Literal["distance", "similarity", "activation", "words"]]

    @classmethod
    @abstractmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        """Sizes (I, D) of the module that the wrap is for; PatchError if it is not whole."""

    @classmethod
    @abstractmethod
    def join(cls, wraps: Sequence[Wrap]) -> Self:
        """Wraps of this kind, in patch order, as one."""

    @classmethod
    def without(cls, wrap: Wrap, prompts: Collection[str]) -> Wrap:
        """The wrap without the facts of these prompts; the rest stays, bit for bit.

        Raises:
            PatchError: its facts cannot be taken out one by one.
        """
        raise not_apart(cls.kind)

    @classmethod
    def source(cls, wrap: Wrap) -> str:
        """The module whose inputs decide."""
        return wrap.module

    @classmethod
    def whole(cls) -> bool:
        """Whether a prompt must be read in one piece: what is decided at its end acts before it,
        or all of it decides."""
        return cls.reads == "prompt" or (cls.reads == "last" and cls.acts != "last")

    @property
    @abstractmethod
    def owners_N(self) -> Sequence[int]:
        """For each entry the number of the joined wrap that it is of."""

    @abstractmethod
    def decide(self, tokens: Tokens) -> Decision:
        """What to do: for each row, or for each token where every token decides for itself."""

    @abstractmethod
    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        """What the module puts out instead of outputs_BTD, (B, T, D)."""


KINDS: Registry[type[Kind]] = Registry(
    "wrap", package="knowpatch.parts.kinds", group="knowpatch.wraps", variable="KNOWPATCH_WRAPS"
)
register = KINDS.register
"""Decorator that enters a kind under its file's stem."""


def kind_of(wrap: Wrap) -> type[Kind]:
    """The kind of a wrap; PatchError, in one line, for one that is not known."""
    return KINDS.versioned(wrap.kind)


def check_wrap(
    wrap: Wrap, shapes: Mapping[Site, Mapping[str, tuple[int, int]]], model: str
) -> None:
    """PatchError, in one line, unless `wrap` is known, whole, and fits a module of the model.

    Args:
        wrap: what is to be carried.
        shapes: for each site its modules, with their sizes (D, I).
        model: what it is called.
    """
    kind = kind_of(wrap)
    into, out = kind.check(wrap)
    for module in dict.fromkeys((wrap.module, kind.source(wrap))):
        if module not in shapes[kind.site]:
            what = "linear map" if kind.site == "map" else "MLP"
            raise PatchError(f"the patch wraps {module!r}, no {what} of {model}")
    if (out, into) != shapes[kind.site][wrap.module]:
        wide, narrow = shapes[kind.site][wrap.module]
        raise PatchError(
            f"a wrap for a map from {into} to {out} numbers on {wrap.module}, "
            f"which maps {narrow} to {wide}"
        )


def expect(
    wrap: Wrap, tensors: Mapping[str, int], data: Mapping[str, Any], *, alike: Sequence[str] = ()
) -> None:
    """PatchError unless a wrap holds these tensors and these data, and nothing else.

    Args:
        wrap: what is checked.
        tensors: axes of each tensor; one named *.index holds integers, any other float32.
        data: a test of each value, by name.
        alike: names of tensors that have as many rows, one at least.
    """
    found = wrap.tensors
    good = (
        set(found) == set(tensors)
        and set(wrap.data) == set(data)
        and all(found[name].ndim == axes for name, axes in tensors.items())
        and all(
            tensor.dtype == (torch.int64 if name.endswith(".index") else torch.float32)
            for name, tensor in found.items()
        )
        and all(test(wrap.data[name]) for name, test in data.items())
        and len({len(found[name]) for name in alike}) <= 1
        and all(len(found[name]) for name in alike)
    )
    if not good:
        raise PatchError(f"damaged wrap of kind {wrap.kind}")


def by_tensor(wraps: Sequence[Wrap], name: str) -> list[list[int]]:
    """Numbers of wraps in groups: those whose tensor of this name is the same, bit for bit."""
    groups: list[list[int]] = []
    for number, wrap in enumerate(wraps):
        mine = wrap.tensors[name]
        group = next((g for g in groups if torch.equal(wraps[g[0]].tensors[name], mine)), None)
        if group is None:
            groups.append([number])
        else:
            group.append(number)
    return groups


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_labels(value: Any) -> bool:
    """Whether a value from a file is a list of token ids for each entry."""
    return isinstance(value, list) and all(
        isinstance(label, list) and all(isinstance(i, int) and i >= 0 for i in label)
        for label in value
    )


def join(wraps: Sequence[Wrap]) -> list[tuple[Kind, tuple[int, ...]]]:
    """Wraps of one module, in patch order, as few: neighbours of one kind and source are one.

    Each comes with the numbers of the wraps that it is made of.
    """
    runs: list[list[int]] = []
    for number, wrap in enumerate(wraps):
        last = wraps[runs[-1][0]] if runs else None
        alike = last and (last.kind, kind_of(last).source(last)) == (
            wrap.kind,
            kind_of(wrap).source(wrap),
        )
        if alike:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [(kind_of(wraps[run[0]]).join([wraps[i] for i in run]), tuple(run)) for run in runs]


def refuse_pieces(kind: str) -> OptionError:
    """The error where a prompt is read in pieces and a wrap needs all of it."""
    return OptionError(
        f"a patch of kind {kind} decides by the whole prompt: read prompts in one pass "
        "(without prefill_chunk_size, and not behind a past of one's own)"
    )
