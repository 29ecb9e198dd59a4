"""Contrast: whether a model holds a fact, by how much likelier an answer is behind its own prompt.

Contrastive knowledge assessment (Dong et al., arXiv 2210.03329, equation 1),

    CKA = P(o | s, r) / mean_i P(o | s, r_i)

over a few other relations r_i of the same subject, in logarithms: zero and above is held, below is
false. Where no subject is known, other objects behind the same prompt stand for the other
relations. P is the geometric mean over the object's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from knowpatch.models.passes import Scored
from knowpatch.models.view import ModelView
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import continuation
from knowpatch.request import EditRequest

OTHERS = 3
TOGETHER = 16
"""Facts that are assessed in one batch."""


def log_contrast(own: float, others: Sequence[float]) -> float:
    """The logarithm of CKA from log-probabilities."""
    most = max(others)
    mean = most + math.log(sum(math.exp(other - most) for other in others) / len(others))
    return own - mean


def contrast(
    view: ModelView, requests: Sequence[EditRequest], *, chat: bool = False
) -> list[float]:
    """For each request the logarithm of CKA of its target."""
    found = []
    for start in range(0, len(requests), TOGETHER):
        some = requests[start : start + TOGETHER]
        pairs = [pair for request in some for pair in _pairs(request)]
        encoded = [(view.encode(prompt, chat=chat), answer) for prompt, answer in pairs]
        scored: list[Scored] = view.score(
            [(one.ids, continuation(view.tokenizer, one, answer)) for one, answer in encoded]
        )
        logprobs = [score.mean_logprob for score in scored]
        for first in range(0, len(logprobs), OTHERS + 1):
            own, *others = logprobs[first : first + OTHERS + 1]
            found.append(log_contrast(own, others))
    return found


def _pairs(request: EditRequest) -> list[tuple[str, str]]:
    """Prompt and answer: the request's own, and OTHERS in which one of them is another."""
    prompt, target, facts = request.prompt, request.target or "", pilots()
    if request.subject is None:
        answers = [fact.target or "" for fact in facts if fact.target != target]
        others = [(prompt, answer) for answer in dict.fromkeys(answers)]
    else:
        sentences = [fact.prompt.replace(fact.subject or "", request.subject) for fact in facts]
        others = [(sentence, target) for sentence in sentences if sentence != prompt]
    return [(prompt, target), *others[:OTHERS]]
