"""The planner's plans: shared beginnings, patches by question, and answers kept on disk."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest
import tiny
import torch
from made import provenance

from knowpatch import ask as planner
from knowpatch.answers import Answers
from knowpatch.ask import Ask
from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import edit, load
from knowpatch.errors import ForeignModelError, OptionError, PatchError, RequestError
from knowpatch.models import shared
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
BEGINNING = "Therefore because you know, it is well known that as everyone knows "
"""Long enough to be worth sharing, and short enough for a window of 64 tokens."""
ANSWERS = ("Paris", "New London")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by one for every pass, generation included, of any model."""
    seen = []
    plain = ModelView.passing

    def passing(self, *args, **kwargs):
        seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ModelView, "passing", passing)
    return seen


def _questions():
    """Some that begin alike in two ways, and some like no other."""
    alike = [f"{BEGINNING}{prompt}" for prompt in list(tiny.FACTS)[:6]]
    return [*alike, *(f"{BEGINNING}the Nile{end}" for end in ("", " flows")), "Two plus two", "The"]


def _naive(model, prompt, answer):
    """Ids, log-probabilities and argmax flags of one plain pass."""
    encoded = model.encode(prompt)
    ids = continuation(model.tokenizer, encoded, answer)
    row = torch.tensor([[*encoded.ids, *ids[:-1]]])
    with torch.no_grad():
        logits = model.model(row).logits[0, len(encoded.ids) - 1 :].float()
    logprobs = logits.log_softmax(-1)[range(len(ids)), ids]
    return ids, logprobs, (logits.argmax(-1) == torch.tensor(ids)).tolist()


def _naive_text(model, prompt, tokens):
    row = torch.tensor([model.encode(prompt).ids])
    with torch.no_grad():
        out = model.model.generate(row, max_new_tokens=tokens, do_sample=False)
    return model.view.decode(out[0, row.shape[1] :].tolist())


def _scores(model, prompts):
    ask = Ask(model)
    futures = [ask.score(prompt, "Paris") for prompt in prompts]
    return [future.result() for future in futures]


def _close(scored, plain):
    ids, logprobs, correct = plain
    assert scored.ids == ids
    assert torch.allclose(torch.tensor(scored.logprobs), logprobs, atol=1e-4)
    assert list(scored.correct) == correct


def _by_hand(model, seed, *, layer=1, size=0.3):
    """A weight patch, large enough to be seen."""
    name = model.view.roles.linear("mlp.out", layer).address.parameter
    out, into = model.view.parameter(name).shape
    made = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, 1, generator=made), torch.randn(1, into, generator=made)
    origin = provenance(model, FRANCE, seed=seed)
    change = LowRank(size * left, right)
    return Patch(origin, (WeightDelta(Address(parameter=name), change, ""),))


def _carried(model):
    """What questions may carry: nothing, weights (two that overlap), a wrap, a rule, several."""
    first, second = _by_hand(model, 1), _by_hand(model, 2, layer=2)
    slight = _by_hand(model, 3, size=1e-3)  # the wrap still sees its key behind it
    fact = EditRequest(prompt=BEGINNING + FRANCE.prompt, subject="France", target="Lyon")
    wrap, rule = (edit(model, fact, method=name) for name in ("grace", "ice"))
    return [(), (first,), (second,), (wrap,), (rule,), (first, second), (slight, wrap)]


# -- beginnings that are shared --------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_shared_beginnings_equal_a_naive_loop(known, monkeypatch, architecture):
    """In large batches and small: log-probabilities to 1e-4, the same flags and texts."""
    model = known(architecture)
    read, reads = model.view.read, []
    monkeypatch.setattr(model.view, "read", lambda rows: reads.append(len(rows)) or read(rows))
    asked = [(prompt, answer) for prompt in _questions() for answer in ANSWERS]
    plain = [_naive(model, *question) for question in asked]
    texts = [_naive_text(model, prompt, 3) for prompt in _questions()]
    for tokens in (4096, 60):
        monkeypatch.setattr(planner, "BATCH_TOKENS", tokens)
        reads.clear()
        ask = Ask(model)
        scores = [ask.score(*question) for question in asked]
        said = [ask.generate(prompt, max_new_tokens=3) for prompt in _questions()]
        for future, one in zip(scores, plain, strict=True):
            _close(future.result(), one)
        assert [future.result().text for future in said] == texts
        assert len(reads) > (2 if tokens == 60 else 0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_shared_beginnings_run_fewer_tokens(known, monkeypatch, architecture):
    """The positions that go through the model, padding included, are well below the prompts'."""
    view = known(architecture).view
    assert shared.holds(view)
    ran = []
    forward = view._forward
    monkeypatch.setattr(
        view, "_forward", lambda **given: ran.append(given["input_ids"].numel()) or forward(**given)
    )
    model = EditedModel(view)
    ask = Ask(model)
    for prompt in _questions()[:8]:
        for answer in ANSWERS:
            ask.score(prompt, answer)
    ask.run()
    whole = 0
    for prompt in _questions()[:8]:
        for answer in ANSWERS:
            encoded = model.encode(prompt)
            whole += len(encoded.ids) + len(continuation(model.tokenizer, encoded, answer)) - 1
    assert sum(ran) < 0.8 * whole


def test_texts_share_their_beginnings_too(known):
    """Generations that begin alike read their beginning once."""
    model = known("llama")
    assert shared.holds(model.view)
    ran = []
    embedding = model.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda m, args: ran.append(args[0].numel()))
    ask = Ask(model)
    prompts = _questions()[:8]
    for prompt in prompts:
        ask.generate(prompt, max_new_tokens=2)
    ask.run()
    handle.remove()
    assert sum(ran) < 0.8 * sum(len(model.encode(prompt).ids) + 1 for prompt in prompts)


def test_a_question_that_begins_another_is_read_right(known):
    """One prompt is the beginning of the next, and one is asked with several answers."""
    model = known("llama")
    words = (BEGINNING * 3 + FRANCE.prompt).split(" ")
    prompts = [" ".join(words[:count]) for count in range(len(words) - 6, len(words) + 1)]
    ask = Ask(model)
    asked = [(prompt, answer) for prompt in prompts for answer in ANSWERS]
    for question, future in [(question, ask.score(*question)) for question in asked]:
        _close(future.result(), _naive(model, *question))
    found = [(prompt, ask.generate(prompt, max_new_tokens=3)) for prompt in prompts]
    for prompt, future in found:
        assert future.result().text == _naive_text(model, prompt, 3)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_prompts_that_a_window_does_not_hold(known, architecture):
    """Questions too long to be read in pieces beneath a sliding window are right all the same."""
    model = known(architecture)
    prompts = [5 * BEGINNING + prompt for prompt in list(tiny.FACTS)[:5]]
    longest = max(len(model.encode(prompt).ids) for prompt in prompts)
    assert longest > model.view.limits.window == 64
    ask = Ask(model)
    scores = [ask.score(prompt, "New London") for prompt in prompts]
    texts = [ask.generate(prompt, max_new_tokens=3) for prompt in prompts]
    for prompt, scored, text in zip(prompts, scores, texts, strict=True):
        _close(scored.result(), _naive(model, prompt, "New London"))
        assert text.result().text == _naive_text(model, prompt, 3)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama"])
def test_beginnings_of_many_lengths_in_one_batch(known, architecture):
    """Padding between a short beginning and its rest does not push it out of a window."""
    view = known(architecture).view
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(view.vocabulary, (12, 40), generator=made).tolist()
    pairs = [((1, *ids[0][:37], i), (5, 6)) for i in range(3)]
    pairs += [((2, *ids[1][:8], i, *ids[i][:28]), (7, 8, 9)) for i in range(2, 11)]
    pairs += [((3, *ids[11][:30]), (4,))]
    with torch.no_grad():
        for (prompt, answer), scored in zip(
            pairs, shared.score(view, pairs, ((),) * len(pairs), [()] * len(pairs)), strict=True
        ):
            logits = view.model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0].float()
            plain = logits[len(prompt) - 1 :].log_softmax(-1)[range(len(answer)), answer]
            assert torch.allclose(torch.tensor(scored.logprobs), plain, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_without_sharing_everything_is_right(known, monkeypatch, architecture):
    """Where the probe says no, no past is read, and the answers are those of single questions."""
    monkeypatch.setattr(shared, "holds", lambda view: False)
    monkeypatch.setattr(ModelView, "read", lambda *args: pytest.fail("a beginning was read"))
    model = known(architecture)
    ask = Ask(model)
    prompts = _questions()
    scores = [ask.score(prompt, "New London") for prompt in prompts]
    texts = [ask.generate(prompt, max_new_tokens=3) for prompt in prompts]
    for prompt, scored, text in zip(prompts, scores, texts, strict=True):
        _close(scored.result(), _naive(model, prompt, "New London"))
        assert text.result().text == _naive_text(model, prompt, 3)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_the_probe_finds_a_past_that_does_not_hold(known, monkeypatch, caplog, fault):
    """A past that raises or gives other numbers is found, told in one line, once, and not used."""
    read = ModelView.read

    def broken(self, rows):
        if fault == "raises":
            raise ValueError("this cache\ncannot be picked from")
        return read(self, [[1] * len(row) for row in rows])

    monkeypatch.setattr(ModelView, "read", broken)
    model = known("llama")
    for _ in range(2):
        ask = Ask(model)
        scores = [(prompt, ask.score(prompt, "Paris")) for prompt in _questions()]
        for prompt, future in scores:
            _close(future.result(), _naive(model, prompt, "Paris"))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert model.view.source in line
    assert "\n" not in line
    assert ("this cache" if fault == "raises" else "differ by") in line


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_question_that_is_too_long_is_one_line(known, architecture):
    """Alone, or sharing its beginning with another, it is refused for its length."""
    model = known(architecture)
    long = "The" + " the" * 254
    for ends in ((" France Japan",), (" France Japan", " Japan France")):
        with pytest.raises(RequestError, match="tokens are more than") as caught:
            _scores(model, [long + end for end in ends])
        assert "\n" not in str(caught.value)


def test_an_error_leaves_what_waited_waiting(known, monkeypatch):
    """After a pass that failed (memory, an interrupt), the futures can still be asked."""
    model = known("llama")
    ask = Ask(model)
    futures = [ask.score(prompt, "Paris") for prompt in ("The", "Two plus two equals")]
    futures.append(ask.generate("The", max_new_tokens=2))
    with monkeypatch.context() as broken:
        broken.setattr(ModelView, "score", lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011 (it has no message)
            futures[0].result()
    _close(futures[1].result(), _naive(model, "Two plus two equals", "Paris"))
    assert all(future.done for future in futures)
    assert futures[2].result().text == _naive_text(model, "The", 2)


# -- patches by question ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_mixed_patches_equal_single_sessions(known, monkeypatch, architecture):
    """Each question, carrying its own patches in one batch, is answered as in a session alone."""
    model = known(architecture)
    prompts, some = [*_questions()[:4], "Two plus two equals"], _carried(model)
    asked = [(prompt, carried) for prompt in prompts for carried in some]
    plain = {}
    for prompt, carried in asked:
        with model.session([carried]):
            ids = model.encode(prompt).ids
            answer = continuation(model.tokenizer, model.encode(prompt), "New London")
            (scored,) = model.view.score([(ids, answer)])
            plain[prompt, carried] = scored, model.view.generate([ids], max_new_tokens=3)[0]
    assert len({plain[prompts[0], carried][0].logprobs for carried in some}) == len(some)
    read, reads = model.view.read, []
    monkeypatch.setattr(model.view, "read", lambda rows: reads.append(len(rows)) or read(rows))
    for tokens in (4096, 100):
        monkeypatch.setattr(planner, "BATCH_TOKENS", tokens)
        ask = Ask(model)
        scores = {
            (prompt, carried): ask.score(prompt, "New London", patches=carried)
            for prompt, carried in asked
        }
        texts = {
            (prompt, carried): ask.generate(prompt, max_new_tokens=3, patches=carried)
            for prompt, carried in asked
        }
        for key, (scored, said) in plain.items():
            found = scores[key].result()
            assert (found.ids, found.correct) == (scored.ids, scored.correct)
            assert found.logprobs == pytest.approx(scored.logprobs, abs=1e-4)
            assert texts[key].result().ids == said
    # Beginnings with different patches are one batch, except where a window is too narrow.
    assert max(reads) >= len(some) - 1 or architecture == "gemma2"


def test_duplicates_run_once_for_each_patch(known, monkeypatch):
    """Equal questions with equal patches share a future; with other patches they do not."""
    model = known("llama")
    rows = []
    plain = ModelView.score
    monkeypatch.setattr(
        ModelView,
        "score",
        lambda self, pairs, *more, **given: (
            rows.append(len(pairs)) or plain(self, pairs, *more, **given)
        ),
    )
    one, two = _by_hand(model, 1), _by_hand(model, 2)
    again = Patch(one.provenance, one.deltas)
    ask = Ask(model)
    asked = [(), (one,), (two,), (one, two), (two, one), (one,), (again,), ()]
    futures = [ask.score(FRANCE.prompt, "Paris", patches=patches) for patches in asked]
    assert futures[1] is futures[5] is futures[6]
    assert futures[0] is futures[7] is ask.score(FRANCE.prompt, "Paris")
    assert ask.score(FRANCE.prompt, "Paris", patches=[one]) is futures[1]
    assert ask.score(FRANCE.prompt, futures[0].result().ids).result() == futures[0].result()
    assert sum(rows) == 5 + 1
    assert len({future.result().logprobs for future in futures[:4]}) == 4


def test_a_question_carries_its_session(known):
    """Asked within a session it carries the patch, also where the result is wanted outside."""
    model = known("llama")
    patch, rule = _by_hand(model, 1), edit(model, FRANCE, method="ice")
    ask = Ask(model)
    told = ask.score(FRANCE.prompt, "Rome", patches=[patch, rule])
    with model.session([[patch, rule]]):
        inside = ask.score(FRANCE.prompt, "Rome")
        text = ask.generate(FRANCE.prompt, max_new_tokens=3)
        bare = ask.score(FRANCE.prompt, "Rome", patches=())
        expected = model.ask(FRANCE.prompt, max_new_tokens=3)
    assert inside is told
    with model.session([[patch, rule]]):
        encoded = model.encode(FRANCE.prompt)
        ids = continuation(model.tokenizer, encoded, "Rome")
        (plain,) = model.view.score([(encoded.ids, ids)])
    assert inside.result().logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert text.result().text.strip() == expected
    _close(bare.result(), _naive(model, FRANCE.prompt, "Rome"))
    assert abs(bare.result().logprobs[0] - inside.result().logprobs[0]) > 1e-2


def test_a_session_of_two_rows_takes_no_single_question(known):
    """One line, for scores and texts; what is told which patches to carry is answered."""
    model = known("llama")
    ask = Ask(model)
    with model.session([_by_hand(model, 1), None]):
        for question in (
            lambda: ask.score(FRANCE.prompt, "Rome"),
            lambda: ask.generate(FRANCE.prompt, max_new_tokens=2),
        ):
            with pytest.raises(OptionError, match="session of 2 rows") as caught:
                question()
            assert "\n" not in str(caught.value)
        bare = ask.score(FRANCE.prompt, "Rome", patches=()).result()
    _close(bare, _naive(model, FRANCE.prompt, "Rome"))


def test_a_patch_that_cannot_be_carried_is_refused(known):
    """Told or by session: one of another model, or one that is live, is refused in one line."""
    model, other = known("llama"), known("gpt2")
    foreign, live = _by_hand(other, 1), _by_hand(model, 1)
    model.apply(live)
    for patch, error in ((foreign, ForeignModelError), (live, PatchError)):
        with pytest.raises(error) as caught, model.session([patch]):
            pass
        with pytest.raises(error) as told:
            Ask(model).score(FRANCE.prompt, "Rome", patches=[patch]).result()
        assert str(told.value) == str(caught.value)


@pytest.mark.parametrize("tokens", [4096, 60])
def test_the_order_of_asking_changes_no_bit(known, monkeypatch, tokens):
    """Scores and texts, with patches and without, are equal for orders that differ."""
    monkeypatch.setattr(planner, "BATCH_TOKENS", tokens)
    model = known("llama")
    patches = [(), (_by_hand(model, 1),), (_by_hand(model, 2),)]
    asked = [(p, a, c) for p in _questions() for a in (*ANSWERS, "Rome") for c in patches]
    found = []
    for seed in (None, 1, 2):
        order = list(asked)
        if seed is not None:
            random.Random(seed).shuffle(order)
        ask = Ask(model)
        scores = {q: ask.score(q[0], q[1], patches=q[2]) for q in order}
        texts = {
            (q[0], q[2]): ask.generate(q[0], max_new_tokens=2, patches=q[2]) for q in order[::-1]
        }
        found.append(
            [scores[q].result() for q in asked] + [texts[q[0], q[2]].result() for q in asked]
        )
    assert found[0] == found[1] == found[2]


# -- answers that are kept -------------------------------------------------------------------------


def _rows(view):
    """How many answers are kept for this model."""
    path = Answers(view).path
    if not path.is_file():
        return 0
    connection = sqlite3.connect(path)
    try:
        return connection.execute("select count(*) from answers").fetchone()[0]
    finally:
        connection.close()


def _ask_some(model, **given):
    """Results of a few scores and texts."""
    ask = Ask(model)
    futures = [ask.score(p, a, **given) for p in list(tiny.FACTS)[:3] for a in ANSWERS]
    futures += [ask.generate(p, max_new_tokens=3, **given) for p in list(tiny.FACTS)[:3]]
    futures.append(ask.score(FRANCE.prompt, "Paris", chat=True, **given))
    return [future.result() for future in futures]


@pytest.fixture
def expected(folder, store, monkeypatch):
    """What the model of `folder` answers, found where nothing is kept."""
    with monkeypatch.context() as alone:
        alone.setattr(Ask, "_kept", lambda self: None)
        found = _ask_some(load(str(folder)))
    assert not list(store.rglob("*.sqlite"))
    return found


def test_kept_answers_are_not_asked_again(folder, store, expected, passes):
    """A new model object from the same folder runs no pass for them, and they are equal."""
    first = load(str(folder))
    assert _ask_some(first) == expected
    assert _rows(first.view) == len(expected)
    second = load(str(folder))
    passes.clear()
    assert _ask_some(second) == expected
    assert passes == []
    ask = Ask(second)
    kept = ask.score(FRANCE.prompt, "Paris")
    new = ask.score(FRANCE.prompt, "Sudan")
    _close(new.result(), _naive(second, FRANCE.prompt, "Sudan"))
    assert kept.result() in expected
    assert len(passes) == 1
    assert _rows(second.view) == len(expected) + 1


def test_more_questions_than_one_statement_takes(folder, store, monkeypatch, passes):
    """Answers are found again however many are looked up."""
    monkeypatch.setattr("knowpatch.answers.AT_ONCE", 3)
    first, second = load(str(folder)), load(str(folder))
    found = _ask_some(first)
    passes.clear()
    assert _ask_some(second) == found
    assert passes == []


def test_nothing_is_kept_or_recalled_of_a_live_patch(folder, store, expected, known):
    """With a patch live the answers are its own; taken back, they are the kept ones."""
    model, memory = load(str(folder)), known("llama", chat=True)
    assert _ask_some(model) == expected
    patch = _by_hand(model, 1)
    with model.applied(patch):
        edited = _ask_some(model)
        assert _rows(model.view) == len(expected)
    assert all(one != base for one, base in zip(edited[:6], expected[:6], strict=True))
    with memory.applied(Patch(_by_hand(memory, 1).provenance, patch.deltas)):
        assert _ask_some(memory) == edited
    with load(str(folder)).applied(patch) as other:
        assert _ask_some(other) == edited
    assert _ask_some(model) == expected


def test_nothing_is_kept_or_recalled_of_a_carried_patch(folder, store, expected):
    """Carried by a session or told, a patch's answers are its own and are not kept."""
    model = load(str(folder))
    patch = _by_hand(model, 1)
    with model.session([patch]):
        carried = _ask_some(model)
    assert _rows(model.view) == 0
    assert _ask_some(model) == expected
    with model.session([patch]):
        assert _ask_some(model) == carried
    assert _ask_some(model, patches=[patch]) == carried
    assert all(one != base for one, base in zip(carried[:6], expected[:6], strict=True))
    assert _rows(model.view) == len(expected)
    with model.session([None]):
        assert _ask_some(model) == expected


def test_nothing_is_kept_of_a_model_in_memory(folder, store, expected, passes):
    """The same weights, handed over in memory, are asked each time, and leave no file."""
    loaded = load(str(folder))
    model = EditedModel.of(loaded.model, loaded.tokenizer)
    for _ in range(2):
        passes.clear()
        assert _ask_some(model) == expected
        assert passes
    assert not list(store.rglob("*.sqlite"))


def test_each_dtype_has_a_file_of_its_own(folder, store, expected, passes):
    """What was kept in float32 is not recalled in bfloat16, nor the other way round."""
    wide, narrow = load(str(folder), dtype="float32"), load(str(folder), dtype="bfloat16")
    assert Answers(wide.view).path != Answers(narrow.view).path
    _ask_some(wide)
    passes.clear()
    coarse = _ask_some(narrow)
    assert passes
    assert coarse[0].logprobs != expected[0].logprobs
    passes.clear()
    assert _ask_some(wide) == expected
    assert _ask_some(narrow) == coarse
    assert passes == []
    assert _rows(wide.view) == _rows(narrow.view) == len(expected)


def test_nothing_is_kept_or_recalled_within_a_trial(folder, store, expected):
    """A change that is only tried out is neither answered from the store nor put there."""
    delta = _by_hand(load(str(folder)), 1).deltas[0]
    model = load(str(folder))
    with model.trying([delta]):
        tried = Ask(model).score(FRANCE.prompt, "Paris").result()
    assert _rows(model.view) == 0
    assert _ask_some(load(str(folder))) == expected
    with model.trying([delta]):
        assert Ask(model).score(FRANCE.prompt, "Paris").result() == tried
    assert tried != expected[0]


def test_what_ends_an_answer_is_part_of_the_model(folder, store, tmp_path):
    """The same weights with another end of answer in generation_config.json are asked anew."""
    first = load(str(folder))
    said = Ask(first).generate(FRANCE.prompt, max_new_tokens=4).result()
    assert len(said.ids) == 4
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "generation_config.json").read_text())
    config["eos_token_id"] = said.ids[1]
    (other / "generation_config.json").write_text(json.dumps(config))
    found = Ask(load(str(other))).generate(FRANCE.prompt, max_new_tokens=4).result()
    assert found.ids == said.ids[:2]


# -- a store that something is wrong with ----------------------------------------------------------


def _other_table(path):
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("create table answers (question, said, at)")
    connection.commit()
    connection.close()


def _other_text(text):
    def write(path):
        connection = sqlite3.connect(path)
        connection.execute("update answers set answer = ?", (text,))
        connection.commit()
        connection.close()

    return write


def _folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "junk": lambda path: path.write_bytes(b"not a database" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "header": lambda path: path.write_bytes(b"\0" * 100 + path.read_bytes()[100:]),
    "folder": _folder,
    "other table": _other_table,
    "half an answer": _other_text("[[1, 2"),
    "no text": _other_text(b"\xff\xfe"),
}
BELIEVED = {
    "nothing": _other_text(None),
    "a number": _other_text("5"),
    "no list": _other_text("{}"),
    "too little": _other_text("[[1]]"),
    "another answer": _other_text("[[1], [true], [-0.5]]"),
}


@pytest.mark.parametrize(
    "damage",
    [*DAMAGES.values(), *BELIEVED.values()],
    ids=[*DAMAGES, *BELIEVED],
)
def test_a_damaged_store_is_only_slower(folder, store, expected, damage):
    """Whatever is found where answers are kept, nothing is raised and the results are right."""
    model = load(str(folder))
    _ask_some(model)
    damage(Answers(model.view).path)
    for _ in range(2):
        for found, plain in zip(_ask_some(load(str(folder))), expected, strict=True):
            assert found.ids == plain.ids
            if hasattr(plain, "logprobs"):
                assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_flipped_bits_are_never_believed(folder, store, expected):
    """With any one bit of the file flipped, what is still found is what was kept."""
    model = load(str(folder))
    _ask_some(model)
    kept = Answers(model.view)
    connection = sqlite3.connect(kept.path)
    keys = [key for (key,) in connection.execute("select key from answers")]
    connection.close()
    right, raw, places = kept.get(keys), kept.path.read_bytes(), random.Random(0)
    assert len(right) == len(expected)
    for _ in range(400):
        damaged = bytearray(raw)
        damaged[places.randrange(len(raw))] ^= 1 << places.randrange(8)
        kept.path.write_bytes(damaged)
        found = kept.get(keys)
        assert {key: found[key] for key in keys if key in found}.items() <= right.items()


def _connecting(monkeypatch, **given):
    """Open stores with other arguments."""
    plain = sqlite3.connect

    def connect(path, **kwargs):
        target = f"{path.as_uri()}?mode=ro" if given.get("uri") else path
        return plain(target, **{**kwargs, **given})

    monkeypatch.setattr("knowpatch.answers.sqlite3.connect", connect)


def test_a_store_that_cannot_be_written_is_read(folder, store, expected, monkeypatch, passes):
    """Read-only, it gives what it has; what it lacks is asked each time, and stays out."""
    model = load(str(folder))
    _ask_some(model)
    _connecting(monkeypatch, uri=True)
    assert _ask_some(load(str(folder))) == expected
    for _ in range(2):
        passes.clear()
        found = Ask(model).score(FRANCE.prompt, "Sudan").result()
        _close(found, _naive(model, FRANCE.prompt, "Sudan"))
        assert len(passes) == 1
    monkeypatch.undo()


@pytest.mark.parametrize(
    "name",
    [
        "file/cache",
        "x" * 300,
    ],
    ids=["taken by a file", "refused by the system"],
)
def test_a_cache_that_cannot_be_made_is_gone_without(folder, expected, monkeypatch, tmp_path, name):
    """Where the cache folder cannot be, everything is asked each time."""
    model = load(str(folder))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KNOWPATCH_CACHE", str(tmp_path / name))
    assert _ask_some(model) == _ask_some(model) == expected


def test_a_locked_store_is_gone_without(folder, store, expected, monkeypatch, passes):
    """While another holds it, answers are asked; afterwards they are kept again."""
    model = load(str(folder))
    _ask_some(model)
    path, count = Answers(model.view).path, _rows(model.view)
    with monkeypatch.context() as impatient:
        _connecting(impatient, timeout=0.01)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("begin exclusive")
        passes.clear()
        for found, plain in zip(_ask_some(load(str(folder))), expected, strict=True):
            assert found.ids == plain.ids
        Ask(model).score(FRANCE.prompt, "Sudan").result()
        assert passes
        other.execute("rollback")
        other.close()
    assert _rows(model.view) == count
    Ask(model).score(FRANCE.prompt, "Sudan").result()
    assert _rows(model.view) == count + 1
    passes.clear()
    assert _ask_some(load(str(folder))) == expected


WRITERS = """
import os, sys, types
from pathlib import Path
sys.modules["knowpatch.models.view"] = types.SimpleNamespace(ModelView=None)  # half the start-up
from knowpatch.answers import Answers
answers = object.__new__(Answers)
answers.path = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
child = os.fork()
mine = "b" if child else "a"
for number in range(20):
    answers.put({f"{who}{number}.{i}": [number, i, "x" * 100] for who in (mine, "both")
                 for i in range(10)})
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_store_that_many_write_stays_readable(folder, store):
    """Two processes write at once while a third reads: no answer is wrong, the file is whole."""
    answers = Answers(load(str(folder)).view)
    right = {
        f"{who}{number}.{i}": [number, i, "x" * 100]
        for who in ("a", "b", "both")
        for number in range(20)
        for i in range(10)
    }
    command = [sys.executable, "-c", WRITERS, str(answers.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as writers:
        assert writers.stdout.readline() == "ready\n"
        writers.stdin.write("go\n")
        writers.stdin.close()
        while writers.poll() is None:
            assert answers.get(list(right)).items() <= right.items()
            time.sleep(0.01)
    assert writers.returncode == 0
    found = answers.get(list(right))
    assert found.items() <= right.items()
    assert {key.rstrip(".0123456789") for key in found} == {"a", "b", "both"}
    connection = sqlite3.connect(answers.path)
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    connection.close()
