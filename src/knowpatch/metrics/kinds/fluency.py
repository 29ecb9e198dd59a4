"""Fluency: how varied an edited model's texts are, and how much they repeat.

Entropy of n-grams as in KnowEdit (arXiv 2401.01286) and ROME, times 100 (entropy.py). Ours takes
the continuation alone, greedy and of one length. `fluency_published` repeats the published recipe:
one text sampled from the 5 likeliest tokens, until prompt and text have 100 tokens, the prompt's
words counted with it; its seed is the prompt's, not the order of asking.

Not here: the text's probability under the unedited model, which would need a second round of
questions. Entropy alone rewards babble: read it beside the repeats.
"""

from __future__ import annotations

from collections.abc import Callable

from knowpatch.data.case import REWRITE, Case, Probe
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.entropy import distinct_share, repeated_share, text_entropy
from knowpatch.metrics.metric import Result, metric, register
from knowpatch.metrics.queries import both

TOKENS = 64
"""Length of the texts."""
PUBLISHED_TOKENS, PUBLISHED_TOP_K = 100, 5
"""Tokens of prompt and text together, and how many likeliest ones are sampled from."""
TOO_SHORT = "the texts have fewer than 3 words"


def _of_texts(
    case: Case, before: Asker, after: Asker, of: Callable[[str], float | None]
) -> Result | None:
    return both(
        case,
        REWRITE,
        (before, after),
        lambda model, probe: model.go_on(probe.prompt, TOKENS),
        lambda _, said: of(said.result().text),
        none=TOO_SHORT,
    )


def hundredfold_entropy(text: str) -> float | None:
    bits = text_entropy(text)
    return None if bits is None else 100 * bits


@metric(
    protocol="free generation",
    about="n-gram entropy of the edited prompt's continuation, in hundredths of a bit",
    percent=False,
)
def fluency_entropy_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return _of_texts(case, before, after, hundredfold_entropy)


@metric(
    protocol="free generation", about="share of the continuation's word pairs that are distinct"
)
def fluency_distinct_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return _of_texts(case, before, after, distinct_share)


@metric(
    protocol="free generation",
    about="share that the longest repeated sequence has of the continuation's words",
    better="less",
)
def fluency_repeat_gen(case: Case, before: Asker, after: Asker) -> Result | None:
    return _of_texts(case, before, after, repeated_share)


@metric(
    protocol="free generation",
    about="n-gram entropy of prompt and sampled text, 100 tokens together, in hundredths of a bit",
    percent=False,
    published=True,
)
def fluency_published(case: Case, before: Asker, after: Asker) -> Result | None:
    return both(
        case,
        REWRITE,
        (before, after),
        _whole_text,
        lambda _, text: hundredfold_entropy(text().replace("\n\n", " ")),
        none=TOO_SHORT,
    )


def _whole_text(model: Asker, probe: Probe) -> Callable[[], str]:
    """The prompt and what is sampled behind it, read as one; a long prompt stands alone."""
    view = model.ask.model.view
    prompt = view.encode(probe.prompt).ids
    left = PUBLISHED_TOKENS - len(prompt)
    if left <= 0:
        return lambda: view.decode(prompt)
    said = model.go_on(probe.prompt, left, top_k=PUBLISHED_TOP_K)
    return lambda: view.decode((*prompt, *said.result().ids))


register(
    "fluency", fluency_entropy_gen, fluency_distinct_gen, fluency_repeat_gen, fluency_published
)
