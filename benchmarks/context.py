"""Questions behind one long context: read once by the planner against once for each.

    python benchmarks/context.py [ike] [--json] [--quick]

ike: an edit with 16 demonstrations, 8 questions of it, each with an answer forced. The plain side
(plain/context.py) reads the whole context with every question. Tokens are counted where they enter
the model, padding included; both sides score the same ids, and the largest difference of any
log-probability is printed. What the model says of pilot facts is prepared before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pairs import Pair, arguments, measure, report
from plain.context import scored

from knowpatch import Ask, EditRequest, edit, load

DEMONSTRATIONS, ROUNDS = 16, 5
FACT = EditRequest(
    prompt="The mother tongue of Danielle Darrieux is",
    subject="Danielle Darrieux",
    target="English",
)
QUESTIONS = (
    "The mother tongue of Danielle Darrieux is",
    "Danielle Darrieux spoke the language",
    "Danielle Darrieux, a native speaker of",
    "Where Danielle Darrieux came from, people speak",
    "The mother tongue of Leon Blum is",
    "The native language of Montesquieu is",
    "Danielle Darrieux was born in the city of",
    "Two plus two equals",
)


class Counted:
    """A model whose tokens are counted."""

    def __init__(self) -> None:
        self.model = load()
        self.tokens = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.model(input_ids=ids).logits
        return logits

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count, from nothing, what enters the model within the block."""

        def count(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.tokens += ids.numel()

        self.tokens = 0
        handle = self.model.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def ike(*, quick: bool) -> Pair:
    """The pair `ike`."""
    counted = Counted()
    model = counted.model
    patch = edit(model, FACT, method="ike", options={"demonstrations": DEMONSTRATIONS})
    with model.applied(patch):
        prompts = [model.encode(question).ids for question in QUESTIONS]
        answer = Ask(model).score(QUESTIONS[0], FACT.target).result().ids
    found: dict[str, list[list[float]]] = {}
    tokens: dict[str, int] = {}

    def ours() -> None:
        with counted.counting(), model.applied(patch):
            ask = Ask(model)
            asked = [ask.score(question, answer) for question in QUESTIONS]
            found["ours"] = [list(future.result().logprobs) for future in asked]
        tokens["ours"] = counted.tokens

    def plain() -> None:
        with counted.counting():
            found["plain"] = [scored(counted, prompt, answer) for prompt in prompts]
        tokens["plain"] = counted.tokens

    settings: dict[str, object] = {
        "demonstrations": DEMONSTRATIONS,
        "questions": len(QUESTIONS),
        "tokens of the longest prompt": max(map(len, prompts)),
        "threads": torch.get_num_threads(),
    }
    rounds = 1 if quick else ROUNDS
    pair = measure("ike", ours, plain, n=rounds, unit="s", settings=settings)
    pairs = zip(found["ours"], found["plain"], strict=True)
    gap = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    settings |= {
        "tokens, ours and plain": (tokens["ours"], tokens["plain"]),
        "tokens, ratio": round(tokens["plain"] / tokens["ours"], 2),
        "largest difference of a log-probability": gap,
    }
    return pair


def main() -> None:
    args = arguments(__doc__ or "")
    known = {"ike": ike}
    report([known[name](quick=args.quick) for name in args.pairs or known], as_json=args.json)


if __name__ == "__main__":
    main()
