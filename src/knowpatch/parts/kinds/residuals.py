"""NeuralDB's table: a residual is added to a module's output wherever a subject is recognised.

Every token of a text decides for itself, those of the answer included: of the entries whose subject
ends in this very token the one whose key is nearest counts, if its cosine is above the entry's
threshold. That the token ids must match is exact, costs nothing, and holds in the steps of a
generation, too, where only the newest token is there to see. A text's first token never fires: what
enters there is the attention sink's, and alike for all texts.

Keys are centred by a mean and of unit length. Entries of several patches about one subject, whose
keys recognise each other, act together: the newer one was made on top of the older, so their
residuals are added. Axes: B rows, T columns, N entries, M tokens, I and D sizes of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from knowpatch.errors import PatchError
from knowpatch.parts.nearest import Index
from knowpatch.parts.wraps import Decision, Kind, Tokens, by_tensor, expect, register
from knowpatch.patch import Wrap

RESIDUALS = "residuals@1"


@dataclass(frozen=True, eq=False)
class Entry:
    """One row of the table.

    Attributes:
        key_I: centred, of unit length.
        residual_D: what to add.
        threshold: cosine above which it answers.
        token, subject: the token that it answers at, and whom it is about.
    """

    key_I: Tensor
    residual_D: Tensor
    threshold: float
    token: int
    subject: str


def residuals(module: str, entries: Sequence[Entry], mean_I: Tensor) -> Wrap:
    """A wrap that adds to a module's output where a subject is recognised.

    Args:
        module: path of a linear map.
        entries: one at least.
        mean_I: what keys are centred by.
    """
    return Wrap(
        module=module,
        kind=RESIDUALS,
        data={
            "tokens": [entry.token for entry in entries],
            "subjects": [entry.subject for entry in entries],
        },
        tensors={
            "keys": torch.stack([entry.key_I for entry in entries]).float(),
            "residuals": torch.stack([entry.residual_D for entry in entries]).float(),
            "thresholds": torch.tensor([entry.threshold for entry in entries]),
            "mean": mean_I.float(),
        },
    )


@dataclass(frozen=True, eq=False)
class _Bank:
    """Entries whose keys are centred by one mean, those of each token side by side.

    Attributes:
        first: number of the first of them among all.
        places: for each token id which of them it has.
    """

    index: Index
    mean_I: Tensor
    first: int
    places: dict[int, slice]

    def to(self, device: torch.device) -> _Bank:
        if self.mean_I.device == device:
            return self
        return _Bank(self.index.to(device), self.mean_I.to(device), self.first, self.places)


@register("residuals")
class Residuals(Kind):
    """The entry nearest to what enters at a token, of those for this token, is added there."""

    kind = RESIDUALS
    reads = "token"
    acts = "all"
    measure = "similarity"

    def __init__(
        self,
        banks: Sequence[_Bank],
        residuals_ND: Tensor,
        thresholds_N: Tensor,
        owners: Sequence[int],
    ) -> None:
        self.banks, self.residuals_ND, self.thresholds_N = list(banks), residuals_ND, thresholds_N
        self._owners = owners

    @classmethod
    def check(cls, wrap: Wrap) -> tuple[int, int]:
        axes = {"keys": 2, "residuals": 2, "thresholds": 1, "mean": 1}
        count = len(wrap.tensors.get("keys", ()))
        data = {
            "tokens": lambda value: _is_list(value, int, count),
            "subjects": lambda value: _is_list(value, str, count),
        }
        expect(wrap, axes, data, alike=("keys", "residuals", "thresholds"))
        into, out = wrap.tensors["keys"].shape[1], wrap.tensors["residuals"].shape[1]
        if len(wrap.tensors["mean"]) != into:
            raise PatchError(f"damaged wrap of kind {wrap.kind}")
        return into, out

    @classmethod
    def join(cls, wraps: Sequence[Wrap]) -> Residuals:
        banks: list[_Bank] = []
        rows: list[_Row] = []
        for group in by_tensor(wraps, "mean"):
            mine = sorted(_rows(wraps, group), key=lambda row: row.token)
            banks.append(_bank(wraps, mine, len(rows)))
            rows += mine
        return cls(
            banks,
            _together(wraps, rows),
            _stacked(wraps, rows, "thresholds"),
            [row.wrap for row in rows],
        )

    @property
    def owners_N(self) -> Sequence[int]:
        return self._owners

    def decide(self, tokens: Tokens) -> Decision:
        device = tokens.inputs_BTI.device
        if self.residuals_ND.device != device:
            self.banks = [bank.to(device) for bank in self.banks]
            self.residuals_ND = self.residuals_ND.to(device)
            self.thresholds_N = self.thresholds_N.to(device)
        scores_BT = torch.full(tokens.ids_BT.shape, -1.0, device=device)
        nearest_BT = torch.zeros_like(tokens.ids_BT)
        ids_BT = torch.where(tokens.first_BT, -1, tokens.ids_BT)
        present = ids_BT.unique().tolist()
        for bank in self.banks:
            for token in present:
                if token in bank.places:
                    self._look(bank, token, ids_BT == token, tokens, (scores_BT, nearest_BT))
        return Decision.above(scores_BT, nearest_BT, self.thresholds_N[nearest_BT])

    def _look(
        self,
        bank: _Bank,
        token: int,
        here_BT: Tensor,
        tokens: Tokens,
        found: tuple[Tensor, Tensor],
    ) -> None:
        """Search a bank where a token stands; what is nearer than what was found replaces it."""
        scores_BT, nearest_BT = found
        queries_MI = unit(tokens.inputs_BTI[here_BT], bank.mean_I)
        gaps_M1, numbers_M1 = bank.index.nearest(queries_MI, among=bank.places[token])
        cosines_M = cosine(gaps_M1[:, 0])
        better_M = cosines_M > scores_BT[here_BT]
        numbers_M = numbers_M1[:, 0] + bank.first
        scores_BT[here_BT] = torch.where(better_M, cosines_M, scores_BT[here_BT])
        nearest_BT[here_BT] = torch.where(better_M, numbers_M, nearest_BT[here_BT])

    def act(self, tokens: Tokens, outputs_BTD: Tensor, decision: Decision) -> Tensor:
        rows_M, columns_M = (decision.entries >= 0).nonzero(as_tuple=True)
        if not len(rows_M):
            return outputs_BTD
        added_MD = self.residuals_ND[decision.entries[rows_M, columns_M]]
        moved_MD = outputs_BTD[rows_M, columns_M] + added_MD.to(outputs_BTD)
        return outputs_BTD.index_put((rows_M, columns_M), moved_MD)


def unit(inputs_MI: Tensor, mean_I: Tensor) -> Tensor:
    """What enters a module, centred, of unit length, float32."""
    return normalize(inputs_MI.float() - mean_I, dim=-1)


def cosine(gaps: Tensor) -> Tensor:
    """The cosine of two vectors of unit length that are so far apart."""
    return 1 - gaps.square() / 2


def _is_list(value: object, of: type, count: int) -> bool:
    """Whether a value from a file is a list of `count` such values."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, of) and not isinstance(one, bool) for one in value)
    )


@dataclass(frozen=True)
class _Row:
    """Entry number `place` of wrap number `wrap`."""

    wrap: int
    place: int
    token: int
    subject: str


def _rows(wraps: Sequence[Wrap], numbers: Sequence[int]) -> list[_Row]:
    return [
        _Row(number, place, token, subject)
        for number in numbers
        for place, (token, subject) in enumerate(
            zip(wraps[number].data["tokens"], wraps[number].data["subjects"], strict=True)
        )
    ]


def _bank(wraps: Sequence[Wrap], rows: Sequence[_Row], first: int) -> _Bank:
    """Entries of one mean, sorted by token."""
    tokens = [row.token for row in rows]
    starts = [i for i, token in enumerate(tokens) if i == 0 or tokens[i - 1] != token]
    stops = [*starts[1:], len(tokens)]
    places = {tokens[i]: slice(i, j) for i, j in zip(starts, stops, strict=True)}
    return _Bank(
        Index(_stacked(wraps, rows, "keys")), wraps[rows[0].wrap].tensors["mean"], first, places
    )


def _stacked(wraps: Sequence[Wrap], rows: Sequence[_Row], name: str) -> Tensor:
    numbers = sorted({row.wrap for row in rows})
    starts, count = {}, 0
    for number in numbers:
        starts[number] = count
        count += len(wraps[number].tensors[name])
    whole = torch.cat([wraps[number].tensors[name] for number in numbers])
    return whole[torch.tensor([starts[row.wrap] + row.place for row in rows])]


def _together(wraps: Sequence[Wrap], rows: Sequence[_Row]) -> Tensor:
    """What each entry adds (N, D): its residual, and those of other wraps about its subject."""
    plain_ND = _stacked(wraps, rows, "residuals")
    whole_ND = plain_ND.clone()
    about: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        about.setdefault((row.subject, row.token), []).append(number)
    for numbers in about.values():
        if len({rows[number].wrap for number in numbers}) > 1:
            for number in numbers:
                others = _recognised(wraps, rows, number, numbers)
                whole_ND[number] += plain_ND[others].sum(0)
    return whole_ND


def _recognised(
    wraps: Sequence[Wrap], rows: Sequence[_Row], mine: int, numbers: Sequence[int]
) -> list[int]:
    """Of entries about one subject those of other wraps that answer at the key of entry `mine`."""
    row, best = rows[mine], dict[int, tuple[float, int]]()
    own = wraps[row.wrap].tensors
    for number in numbers:
        other = rows[number]
        theirs = wraps[other.wrap].tensors
        if other.wrap == row.wrap or not torch.equal(own["mean"], theirs["mean"]):
            continue
        alike = float(own["keys"][row.place] @ theirs["keys"][other.place])
        if alike > float(theirs["thresholds"][other.place]):
            best[other.wrap] = max(best.get(other.wrap, (-1.0, -1)), (alike, number))
    return [number for _, number in best.values()]
