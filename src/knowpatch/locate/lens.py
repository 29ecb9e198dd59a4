"""The logit lens: what the final norm and head make of each block's output, token by token.

After nostalgebraist ("interpreting GPT: the logit lens", 2020): lens_l = head(norm(h_l)), with h_0
what enters the first block. At the last block it is what the model says. Early blocks write in
another basis, so what it says of them is biased; compare before and after rather than layer with
layer. Axes: L states (blocks + 1), T tokens, A answers, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowpatch.edited import EditedModel
from knowpatch.errors import OptionError
from knowpatch.models.passes import Ids, Tap
from knowpatch.models.readout import Readout
from knowpatch.models.view import ModelView
from knowpatch.patch import Patch

TOP = 5
"""Likeliest tokens that are kept."""
SMALLEST = 10
"""An answer is near from this rank on."""


@dataclass(frozen=True, eq=False)
class Lens:
    """What each state says comes next.

    Attributes:
        tokens: the text of each of the T tokens.
        answers: the token whose fate is followed, by what it stands for.
        top_LTK, top_p_LTK: the likeliest tokens, as ids, and their probabilities.
        p_LTA, rank_LTA: of each answer; ranks from 1.
        kl_LT: KL divergence of the last state's distribution from this one, in nats.
        entropy_LT: in nats.
    """

    tokens: tuple[str, ...]
    answers: Mapping[str, int]
    top_LTK: Tensor
    top_p_LTK: Tensor
    p_LTA: Tensor
    rank_LTA: Tensor
    kl_LT: Tensor
    entropy_LT: Tensor

    def last(self, count: int) -> Lens:
        """The last `count` tokens alone."""
        cut = {
            name: value[:, -count:]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Lens(self.tokens[-count:], self.answers, **cut)

    def enters(self, answer: str, rank: int) -> int | None:
        """The first state, from 0 (what enters the blocks), at which an answer is among so many, at
        the last token; None where it never is."""
        ranks_L = self.rank_LTA[:, -1, list(self.answers).index(answer)]
        reached = (ranks_L <= rank).nonzero()[:, 0].tolist()
        return reached[0] if reached else None

    def crosses(self, answer: str, other: str) -> int | None:
        """The state from which on `answer` is likelier than `other`, at the last token; None where
        it is not at the end."""
        names = list(self.answers)
        ahead_L = self.p_LTA[:, -1, names.index(answer)] > self.p_LTA[:, -1, names.index(other)]
        behind = (~ahead_L).nonzero()[:, 0].tolist()
        first = behind[-1] + 1 if behind else 0
        return first if first < len(ahead_L) else None


def lens(view: ModelView, ids: Ids, answers: Mapping[str, int]) -> Lens:
    """The lens over one row of ids, with what is live, tried or carried in force.

    Args:
        view: the model.
        ids: a prompt.
        answers: tokens to follow, by name.
    """
    blocks = view.roles.blocks
    taps = [Tap(blocks[0].module, "input"), *(Tap(one.module, "output") for one in blocks)]
    run = view.run([ids], taps=taps)
    places = [(0, column) for column in range(len(ids))]
    readout = Readout(view)
    final_TV = readout.logits(run.at(taps[-1], places)).log_softmax(-1)
    told = [
        _told(readout.logits(run.at(tap, places)).log_softmax(-1), final_TV, list(answers.values()))
        for tap in taps
    ]
    return Lens(
        tuple(view.tokenizer.decode([token]) for token in ids),
        dict(answers),
        *(torch.stack(parts) for parts in zip(*told, strict=True)),
    )


def _told(logprobs_TV: Tensor, final_TV: Tensor, answers: Sequence[int]) -> tuple[Tensor, ...]:
    """What is kept of one state's distributions, in the order of Lens."""
    top = logprobs_TV.topk(min(TOP, logprobs_TV.shape[1]), dim=-1)
    mine_TA = logprobs_TV[:, list(answers)]
    ranks = [(logprobs_TV > one_T[:, None]).sum(1) + 1 for one_T in mine_TA.T]
    rank_TA = torch.stack(ranks, dim=1) if ranks else mine_TA.long()
    kl_T = (final_TV.exp() * (final_TV - logprobs_TV)).sum(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    kept = (top.indices, top.values.exp(), mine_TA.exp(), rank_TA, kl_T.clamp(min=0), entropy_T)
    return tuple(part.cpu() for part in kept)


def before_and_after(
    model: EditedModel, prompt: str, patches: Sequence[Patch], answers: Mapping[str, int]
) -> tuple[Lens, Lens | None]:
    """The lens without and with patches, over the tokens that both readings of the prompt end in.

    A prompt rule puts text before the prompt; what it adds is not shown.

    Raises:
        OptionError: a patch answers by a procedure, or mixes two readings, or changes the prompt's
            own end.
    """
    for patch in patches:
        if patch.procedure is not None:
            raise OptionError(
                f"patch {patch.id[:12]} answers in several calls of the model: there is no one "
                "pass to look into"
            )
    ids = model.encode(prompt).ids
    without = lens(model.view, ids, answers)
    if not patches:
        return without, None
    with model.applied(*patches):
        read = model.encode(prompt).ids
        changed = lens(model.view, read, answers)
    same = _common_end(ids, read)
    if not same:
        raise OptionError("a patch changes the end of the prompt: there is nothing to compare")
    return without.last(same), changed.last(same)


def _common_end(one: Ids, other: Ids) -> int:
    """How many tokens at the end are the same."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def plain(found: Lens, view: ModelView) -> dict[str, Any]:
    """As JSON has it: for each state (0: what enters the blocks) and token."""
    names = list(found.answers)

    def cell(state: int, token: int) -> dict[str, Any]:
        top = zip(found.top_LTK[state, token], found.top_p_LTK[state, token], strict=True)
        answers = zip(names, found.p_LTA[state, token], found.rank_LTA[state, token], strict=True)
        return {
            "top": [{"token": view.tokenizer.decode([int(i)]), "p": float(p)} for i, p in top],
            "answers": {name: {"p": float(p), "rank": int(rank)} for name, p, rank in answers},
            "kl": float(found.kl_LT[state, token]),
            "entropy": float(found.entropy_LT[state, token]),
        }

    states, tokens = found.kl_LT.shape
    return {
        "tokens": list(found.tokens),
        "states": [[cell(state, token) for token in range(tokens)] for state in range(states)],
        "enters": {
            name: {"first": found.enters(name, 1), "near": found.enters(name, SMALLEST)}
            for name in names
        },
    }
