"""A weight change in vocabulary space (KnowEdit, arXiv 2401.01286, Figure 7).

After Geva et al. (arXiv 2203.14680): a column of a map that writes into the residual stream, times
the output head, is a list of words. Of the COLUMNS columns that a patch changes most, before the
change and after it, is the new answer's first token among the k highest of any? As published the
columns are taken as they are; `normed`, times the final norm's gain, as the head will see them.

A low hit is no failure: what the middle of a model writes is read by the blocks above before the
head. So it is a question about where a method writes, not about how well.
Axes: C columns, D hidden size, I inputs of a map, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.locate.change import Changed
from knowpatch.models.readout import Readout
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

COLUMNS = 5
"""Columns that are looked at: those that changed most."""
KS = (1, 10, 50)
WRITING = ("mlp.out", "attn.out")
"""Roles of the maps that write into the residual stream."""
DRAWS = 20
"""Times that as many columns are drawn at random, to compare with."""


@dataclass(frozen=True)
class Ranks:
    """Where an answer's first token stands, from 1: the best over columns.

    Attributes:
        before, after: in the columns that changed most.
        random: for each draw, in columns of the same matrices drawn at random, after the change.
        change: in the columns of the change itself.
        direction: in its first left singular vector, of the sign that puts it higher.
    """

    before: int
    after: int
    random: tuple[int, ...]
    change: int
    direction: int

    def hits(self, k: int) -> dict[str, float]:
        """Hit@k of each; of the random columns, the share of the draws."""
        return {
            "before": float(self.before <= k),
            "after": float(self.after <= k),
            "random": sum(rank <= k for rank in self.random) / len(self.random),
        }


@dataclass(frozen=True)
class Projected:
    """One edit's answers in the columns that its patch changed most.

    Attributes:
        token: the new answer's first token, as text.
        telling: whether that is more than a single letter, which would stand for any word.
        new: of the new answer, old: of the one before, where the request names it.
    """

    token: str
    telling: bool
    new: Ranks
    old: Ranks | None


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns that a patch changed most, of the maps that write into the residual stream.

    Attributes:
        places: (block, column) of each, most changed first.
        before_CD, after_CD, change_CD: the columns.
        random_CD: columns drawn at random, DRAWS times as many.
        direction_D: first left singular vector of the matrix that changed most.
    """

    places: tuple[tuple[int, int], ...]
    before_CD: Tensor
    after_CD: Tensor
    change_CD: Tensor
    random_CD: Tensor
    direction_D: Tensor


def columns(matrices: Sequence[Changed], *, seed: int = 0) -> Columns | None:
    """The COLUMNS columns that changed most, of all these matrices together.

    None where none of them writes into the residual stream.
    """
    writing = [one for one in matrices if one.role in WRITING]
    if not writing:
        return None
    norms_N = torch.cat([one.change_DI.norm(dim=0) for one in writing])
    most = norms_N.topk(min(COLUMNS, len(norms_N))).indices
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(norms_N), (DRAWS * len(most),), generator=generator)
    chosen, random = ([_column(writing, int(i)) for i in some] for some in (most, drawn))
    return Columns(
        places=tuple((one.layer or 0, i) for one, i in chosen),
        before_CD=torch.stack([one.weight_DI[:, i] for one, i in chosen]),
        after_CD=torch.stack([one.weight_DI[:, i] + one.change_DI[:, i] for one, i in chosen]),
        change_CD=torch.stack([one.change_DI[:, i] for one, i in chosen]),
        random_CD=torch.stack([one.weight_DI[:, i] + one.change_DI[:, i] for one, i in random]),
        direction_D=_direction(max(writing, key=lambda one: float(one.change_DI.norm()))),
    )


def _column(matrices: Sequence[Changed], number: int) -> tuple[Changed, int]:
    """Of all columns side by side, the one of this number: its matrix, and its place there."""
    for one in matrices:
        if number < one.change_DI.shape[1]:
            return one, number
        number -= one.change_DI.shape[1]
    raise AssertionError(number)


def _direction(one: Changed) -> Tensor:
    """The first left singular vector (D)."""
    if one.factors is not None:
        left, inner = torch.linalg.qr(one.factors[0].double())
        small = inner @ one.factors[1].double()
        vectors, _, _ = torch.linalg.svd(small, full_matrices=False)
        return torch.mv(left, vectors[:, 0]).float()
    vectors, _, _ = torch.linalg.svd(one.change_DI, full_matrices=False)
    return torch.select(vectors, 1, 0)


def ranks(scores_CV: Tensor, tokens: Sequence[int]) -> Tensor:
    """For each column, where each token stands in it, from 1: (C, tokens); of equals, last."""
    mine_CT = scores_CV[:, list(tokens)]
    return torch.stack([(scores_CV >= one_C[:, None]).sum(1) for one_C in mine_CT.T], dim=1)


def project(
    view: ModelView, found: Columns, requests: Sequence[EditRequest], *, normed: bool
) -> list[Projected]:
    """Each request's answers in these columns.

    Raises:
        ModelError: `normed`, and what enters the head is no state of the blocks.
    """
    tokens = [_tokens(view, request) for request in requests]
    flat = sorted({token for pair in tokens for token in pair if token is not None})
    read = {token: i for i, token in enumerate(flat)}
    gain_D = Readout(view).gain().cpu() if normed else torch.ones(view.roles.hidden_size)
    head_VD = view.values(f"{view.roles.head}.weight").float().cpu()

    def placed(some_CD: Tensor) -> Tensor:
        return ranks((some_CD * gain_D) @ head_VD.T, flat)

    signed_CD = torch.stack([found.direction_D, -found.direction_D])
    parts = {
        "before": placed(found.before_CD),
        "after": placed(found.after_CD),
        "random": placed(found.random_CD),
        "change": placed(found.change_CD),
        "direction": placed(signed_CD),
    }
    count = len(found.places)
    projected = []
    for new, old in tokens:
        text = view.decode([new])
        mine = [_of(parts, read[token], count) for token in (new, old) if token is not None]
        telling = len(text.strip()) > 1
        projected.append(Projected(text, telling, mine[0], mine[1] if len(mine) > 1 else None))
    return projected


def words(view: ModelView, states_ND: Tensor, count: int) -> list[list[str]]:
    """The tokens that each direction in the residual stream writes most, as the head will see it.

    Raises:
        ModelError: what enters the head is no state of the blocks.
    """
    gain_D = Readout(view).gain().cpu()
    head_VD = view.values(f"{view.roles.head}.weight").float().cpu()
    best_NK = ((states_ND.cpu() * gain_D) @ head_VD.T).topk(count, dim=1).indices
    return [[view.decode([token]) for token in row] for row in best_NK.tolist()]


def _tokens(view: ModelView, request: EditRequest) -> tuple[int, int | None]:
    """The first tokens of the new and of the old answer, as they follow the prompt."""
    encoded = view.encode(request.prompt)
    new = continuation(view.tokenizer, encoded, request.target)[0]
    old = request.old and continuation(view.tokenizer, encoded, request.old)[0]
    return new, old or None


def _of(parts: Mapping[str, Tensor], token: int, count: int) -> Ranks:
    best = {name: int(ranks_CT[:, token].min()) for name, ranks_CT in parts.items()}
    draws_NC = parts["random"][:, token].reshape(-1, count)
    random = tuple(draws_NC.min(1).values.tolist())
    return Ranks(best["before"], best["after"], random, best["change"], best["direction"])
