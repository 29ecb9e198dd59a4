"""The planner: equal to asking one by one, each question once."""

from __future__ import annotations

import pytest
import tiny
import torch

from knowpatch import ask as planner
from knowpatch.ask import Ask
from knowpatch.parts.spans import continuation


@pytest.fixture
def model(known):
    return known("llama", chat=True)


def test_results_equal_a_naive_loop(model, monkeypatch):
    """In small batches: the log-probabilities of single calls to 1e-4, and the same texts."""
    monkeypatch.setattr(planner, "BATCH_TOKENS", 40)
    prompts = [
        *tiny.FACTS,
        "The",
        "As everyone knows, the capital of Italy is",
        "New Fact: Prompt:",
    ]
    asked = [(p, a) for p in prompts for a in ("Paris", "New London", "I don't know.", "four")]
    ask = Ask(model)
    scores = [ask.score(p, a) for p, a in asked]
    texts = [ask.generate(p, max_new_tokens=4) for p in prompts]
    for (prompt, answer), future in zip(asked, scores, strict=True):
        encoded = model.encode(prompt)
        ids = continuation(model.tokenizer, encoded, answer)
        row = torch.tensor([[*encoded.ids, *ids[:-1]]])
        with torch.no_grad():
            logits = model.model(row).logits[0, len(encoded.ids) - 1 :].float()
        plain = logits.log_softmax(-1)[range(len(ids)), ids]
        assert future.result().ids == ids
        assert torch.allclose(torch.tensor(future.result().logprobs), plain, atol=1e-4)
        assert list(future.result().correct) == (logits.argmax(-1) == torch.tensor(ids)).tolist()
    for prompt, future in zip(prompts, texts, strict=True):
        row = torch.tensor([model.encode(prompt).ids])
        with torch.no_grad():
            out = model.model.generate(row, max_new_tokens=4, do_sample=False)
        assert future.result().text == model.view.decode(out[0, row.shape[1] :].tolist())


def test_equal_questions_run_once_and_together(model, monkeypatch):
    """Duplicates share a future; one result runs everything that waits, in one batch."""
    calls = []
    plain = type(model.view).score
    monkeypatch.setattr(
        type(model.view),
        "score",
        lambda self, pairs, *more, **given: (
            calls.append(len(pairs)) or plain(self, pairs, *more, **given)
        ),
    )
    ask = Ask(model)
    first = ask.score("The capital of France is", "Paris")
    assert ask.score("The capital of France is", "Paris") is first
    other = ask.score("The capital of France is", "Rome")
    chat = ask.score("The capital of France is", "Paris", chat=True)
    assert calls == []
    assert first.result().accuracy == 1
    assert calls == [3]
    assert other.result().probability < 0.5
    assert chat.result().ids
    assert calls == [3]


def test_probability_is_that_of_the_whole_answer(model):
    """The product over the answer's tokens."""
    scored = Ask(model).score("The capital of France is", "New London").result()
    assert scored.probability == pytest.approx(torch.tensor(scored.logprobs).sum().exp().item())
