"""What an edit did: every probe asked before and after, and whether the edit took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knowpatch.ask import Ask
from knowpatch.data.case import REWRITE, Probe
from knowpatch.edited import EditedModel
from knowpatch.errors import Unscored
from knowpatch.future import Future
from knowpatch.models.passes import Scored
from knowpatch.patch import Patch
from knowpatch.probes import OUGHT_TO_STAY
from knowpatch.progress import Progress, silent
from knowpatch.request import EditRequest
from knowpatch.stepping import Generated

FIX_TOKENS, ANSWER_TOKENS = 12, 5
"""Length of the answers shown: of the edited prompts, and of all others."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: what the model says, greedily, in a few tokens.
        accuracy: share of the expected answer's tokens that are the most likely ones when forced
            (for a locality probe, of the tokens the model said before).
        probability: of the whole expected answer, forced. Both None where none can be forced.
    """

    text: str
    accuracy: float | None
    probability: float | None


@dataclass(frozen=True)
class Effect:
    """One probe before and after. `expected` is, for a locality probe, what was said before."""

    probe: Probe
    expected: str
    before: Answer
    after: Answer

    @property
    def moved(self) -> bool:
        """Whether the answer is another one now."""
        return self.after.text != self.before.text

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        probe = self.probe
        return {
            "kind": probe.kind,
            "prompt": probe.prompt,
            "chat": probe.chat,
            "request": probe.request,
            "expected": self.expected,
            "before": asdict(self.before),
            "after": asdict(self.after),
        }


def measure(
    model: EditedModel,
    patches: Sequence[Patch],
    probes: Sequence[Probe],
    *,
    progress: Progress = silent,
) -> list[Effect]:
    """Ask every probe without and with `patches`; the model is given back as it was."""
    return compare(model, probes, model.applied(*patches), progress=progress)


def compare(
    model: EditedModel,
    probes: Sequence[Probe],
    changed: contextlib.AbstractContextManager[object],
    *,
    progress: Progress = silent,
) -> list[Effect]:
    """Ask every probe of the model as it is, and as it is within `changed`."""
    before = Ask(model, progress=progress)
    said = [before.generate(p.prompt, max_new_tokens=_tokens(p), chat=p.chat) for p in probes]
    wanted = [
        said_before.result().ids if probe.expected is None else probe.expected
        for probe, said_before in zip(probes, said, strict=True)
    ]
    forced = [before.score(p.prompt, w, chat=p.chat) for p, w in zip(probes, wanted, strict=True)]
    before.run()
    with changed:
        after = Ask(model, progress=progress)
        scored = [
            after.score(p.prompt, w, chat=p.chat) for p, w in zip(probes, wanted, strict=True)
        ]
        after.run()
        says = [
            _says(after, probe, old, score)
            for probe, old, score in zip(probes, said, scored, strict=True)
        ]
        after.run()
    return [
        Effect(
            probe,
            probe.expected if probe.expected is not None else old.result().text,
            _answer(old.result(), first),
            _answer(new.result(), second),
        )
        for probe, old, first, new, second in zip(probes, said, forced, says, scored, strict=True)
    ]


def _tokens(probe: Probe) -> int:
    return ANSWER_TOKENS if probe.expected is None else FIX_TOKENS


def _says(
    ask: Ask, probe: Probe, old: Future[Generated], score: Future[Scored]
) -> Future[Generated]:
    """What the model says now: the old answer, if each of its tokens still leads."""
    forced = _known(score)
    if probe.expected is None and forced is not None and all(forced.correct):
        return old
    return ask.generate(probe.prompt, max_new_tokens=_tokens(probe), chat=probe.chat)


def _known(score: Future[Scored]) -> Scored | None:
    """The score; None where there is none (a procedure answers)."""
    with contextlib.suppress(Unscored):
        return score.result()
    return None


def _answer(said: Generated, score: Future[Scored]) -> Answer:
    forced = _known(score)
    if forced is None:
        return Answer(said.text, None, None)
    return Answer(said.text, forced.accuracy, forced.probability)


def took(
    effects: Iterable[Effect],
    requests: Sequence[EditRequest],
    expected: Sequence[str | None],
    *,
    chat: bool,
) -> list[bool]:
    """For each request, whether its edit took, asked in the way it was edited.

    A promised answer must be the most likely one at each of its tokens, and an erased answer must
    not be said any more.
    """
    results = [False] * len(requests)
    for effect in effects:
        probe = effect.probe
        if probe.kind != REWRITE or probe.chat != chat or probe.request is None:
            continue
        number = probe.request
        request, promised = requests[number], expected[number]
        says = effect.after.accuracy is None and _says_it(effect.after.text, promised)
        learned = promised is None or says or effect.after.accuracy == 1.0
        gone = request.kind != "erase" or not _says_it(effect.after.text, request.old)
        results[number] = learned and gone
    return results


def _says_it(text: str, answer: str | None) -> bool:
    return answer is not None and answer.strip().casefold() in text.casefold()


def moved_by_kind(effects: Iterable[Effect]) -> dict[str, tuple[int, int]]:
    """For each locality kind: how many answers moved, of how many."""
    counts = dict.fromkeys(OUGHT_TO_STAY, (0, 0))
    for effect in effects:
        if effect.probe.kind in counts:
            moved, total = counts[effect.probe.kind]
            counts[effect.probe.kind] = (moved + effect.moved, total + 1)
    return counts
