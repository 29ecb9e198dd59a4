"""The plain side of benchmarks/context.py scores what the library scores."""

from __future__ import annotations

import pytest
from plain.context import scored

from knowpatch.parts.spans import continuation


def test_a_pass_of_its_own_scores_the_same(known):
    """Each answer's log-probabilities, behind a context of its own."""
    model = known("llama")
    context = "New Fact: The capital of France is Rome\nPrompt: "
    prompt = model.view.encode("The capital of Japan is", before=context)
    answer = continuation(model.tokenizer, prompt, "Paris Tokyo")
    (theirs,) = model.view.score([(prompt.ids, answer)])
    plain = scored(lambda ids: model.model(input_ids=ids).logits, prompt.ids, answer)
    assert plain == pytest.approx(theirs.logprobs, abs=1e-5)
