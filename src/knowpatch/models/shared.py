"""Shared: questions that begin alike are read once up to where they part.

Rows with the same patches that share a beginning are read on from one past. The last token of a
prompt is always read with its row: what is predicted first stands there, and wraps act there.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

import torch

from knowpatch.models.beside import Rows, session
from knowpatch.models.passes import Ids, Scored
from knowpatch.models.past import Past, shared_beginnings
from knowpatch.models.sampling import Sampled
from knowpatch.models.view import ModelView, S

log = logging.getLogger(__name__)

WORTH = 48
"""Tokens that must be saved for one pass more."""
TOLERANCE = 1e-2
"""Largest difference, in log-probability, at which a probe says that sharing holds."""


def heads(
    view: ModelView, prompts: Sequence[Ids], rows: Rows, lengths: Sequence[int], *, apart: bool
) -> list[Ids]:
    """For each prompt the beginning that is worth reading once for several; () for none.

    Args:
        view: the model.
        prompts: ids of each prompt.
        rows: the patches that each carries.
        lengths: tokens of each row, its answer included.
        apart: whether each beginning is read in a pass of its own; else all are in one.
    """
    found: list[Ids] = [()] * len(prompts)
    for patches in dict.fromkeys(rows):
        mine = [
            i
            for i, length in enumerate(lengths)
            if rows[i] == patches and view.reads_in_pieces(length, 2, patches)
        ]
        for i, head in zip(mine, shared_beginnings([prompts[i][:-1] for i in mine]), strict=True):
            found[i] = head
    counts = Counter(zip(found, rows, strict=True))
    saved = {key: (count - 1) * len(key[0]) for key, count in counts.items()}
    least = WORTH if apart else 1 if sum(saved.values()) >= WORTH else math.inf
    found = [
        head if saved[head, patches] >= least else ()
        for head, patches in zip(found, rows, strict=True)
    ]
    return found if any(found) and holds(view) else [()] * len(prompts)


def score(
    view: ModelView,
    pairs: Sequence[tuple[Ids, Ids]],
    rows: Rows,
    begun: Sequence[Ids],
    give: type[S] = Scored,  # type: ignore[assignment]
) -> list[S]:
    """Force each answer behind its prompt, in one batch; row i carries rows[i] and begins with
    begun[i], which is read once for all that share it."""
    past = read(view, begun, rows) if any(begun) else None
    rest = [(prompt[len(head) :], a) for (prompt, a), head in zip(pairs, begun, strict=True)]
    with session(view.model, rows):
        return view.score(rest, give, past=past)


def read(view: ModelView, begun: Sequence[Ids], rows: Rows) -> Past:
    """The past of each row's beginning, each distinct one read once."""
    keys = list(zip(begun, rows, strict=True))
    distinct = list(dict.fromkeys(keys))
    with session(view.model, tuple(patches for _, patches in distinct)):
        past = view.read([head for head, _ in distinct])
    return past.pick([distinct.index(key) for key in keys])


def generate(
    view: ModelView,
    prompts: Sequence[Ids],
    rows: Rows,
    head: Ids,
    *,
    max_new_tokens: int,
    sampled: Sampled | None = None,
    whole: bool = False,
    until: Sequence[str] = (),
) -> list[Ids]:
    """Continue each prompt, in one batch; row i carries rows[i], and all begin with `head`: a
    generation wants its past without holes.

    Keywords as `ModelView.generate` takes them.
    """
    past = read(view, [head] * len(prompts), rows) if head else None
    with session(view.model, rows):
        return view.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            sampled=sampled,
            whole=whole,
            until=until,
            past=past,
        )


def holds(view: ModelView) -> bool:
    """Whether reading on from a shared past gives what reading whole gives, on a few rows."""
    if "shared" not in view.probed:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ids = torch.randint(min(view.vocabulary, 1000), (4, 6)).tolist()
        head = tuple(ids[0])
        pairs = [((*head, *ids[1]), (ids[2][0], 1)), ((*head, ids[3][0]), (2,)), ((5, 6), (7, 8))]
        none: Rows = ((),) * len(pairs)
        fault = None
        try:
            with session(view.model, none):
                plain: list[Scored] = view.score(pairs)
            fast: list[Scored] = score(view, pairs, none, [head, head, ()])
            gaps = [
                abs(a - b)
                for one, other in zip(plain, fast, strict=True)
                for a, b in zip(one.logprobs, other.logprobs, strict=True)
            ]
            fault = (
                f"differ by {max(gaps):.1e}" if max(gaps) > view.limits.slack(TOLERANCE) else None
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if fault:
            log.warning("%s reads every question whole: shared beginnings %s", view.source, fault)
        view.probed["shared"] = None if fault else "yes"
    return view.probed["shared"] is not None
