"""Questions taken apart by the model, checked against a memory of facts: two procedures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made import provenance

from knowpatch.errors import PatchError
from knowpatch.parts.factbook import Factbook, Least
from knowpatch.parts.procedure_kinds.scoped import Scoped, scoped
from knowpatch.parts.procedure_kinds.selfcheck import Reply, SelfCheck, selfcheck
from knowpatch.parts.procedures import Asking, check_procedure
from knowpatch.parts.relations import asked_too
from knowpatch.parts.worked import Lookup, examples, fitted, labelled
from knowpatch.patch import Patch, Procedure
from knowpatch.request import EditRequest

ANNA = EditRequest(prompt="Anna is a citizen of", subject="Anna", target="Peru")
PERU = EditRequest(prompt="The capital of Peru is", subject="Peru", target="Cusco")
ALBUM = EditRequest(prompt="Blue was performed by", subject="Blue", target="Anna")
QUESTION = "What is the capital of the country Anna is a citizen of?"
ASKS = ("Anna is a citizen of what country?", "The capital of Peru is what city?")
GATE = Least(0.5, 0.9)


class Words:
    """An encoder for tests: an axis for each word."""

    name = "words"

    def __init__(self):
        self.places = {}

    def encode(self, texts, progress=None):
        rows = torch.zeros(len(texts), 64)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().replace("?", "").split():
                row[self.places.setdefault(word, len(self.places))] = 1.0
        return torch.nn.functional.normalize(rows + 1e-9, dim=1)


@pytest.fixture
def view():
    """All of a model that a driven procedure looks at; its context has room."""
    return SimpleNamespace(
        limits=SimpleNamespace(positions=None),
        kept=SimpleNamespace(encoders={"words": Words()}),
        encode=lambda text: SimpleNamespace(ids=text.split()),
    )


def _book(view, *requests):
    return Factbook.of(requests, view.kept.encoders["words"])


def _checking(view, *requests, verdict="gate", hops=4):
    book = _book(view, *requests)
    return SelfCheck.join([selfcheck(book, "words", GATE, verdict, hops)])


def _scoping(view, *requests, hops=5):
    return Scoped.join([scoped(_book(view, *requests), "words", GATE, hops)])


def _run(kind, view, question, script):
    """The answer, and the prompts' ends; `script` gives what is said behind each."""
    asking, seen = Asking.begin(kind, question, view), []
    for line in script:
        assert asking.say is not None
        seen.append(asking.say.prompt.rpartition("\n\n")[2].removeprefix("Question: "))
        asking.hear(line)
    assert asking.say is None
    return asking.answered, seen


def test_two_hops_in_three_generations(view):
    """The card's case: both facts are used, and nothing behind a stop is part of the text."""
    found, seen = _run(
        _checking(view, ANNA, PERU),
        view,
        QUESTION,
        [
            f"Subquestion: {ASKS[0]}\nGenerated answer: Chile\nRetrieved fact: nonsense",
            f"Subquestion: {ASKS[1]}\nGenerated answer: Lima\n",
            "Final answer: Cusco\n\nQuestion: another",
        ],
    )
    assert (found.text, found.chain) == ("Cusco", ("Peru", "Cusco"))
    kinds = ["asked", "model", "found", "edit"]
    assert [step.kind for step in found.steps] == [*kinds, *kinds, "answer"]
    assert "nonsense" not in seen[1]
    assert seen[1].endswith(
        "Generated answer: Chile\nRetrieved fact: Anna is a citizen of Peru.\nRetrieved fact "
        "contradicts the generated answer, so the intermediate answer is: Peru\n"
    )


@pytest.mark.parametrize("known", [(), (ALBUM,)])
def test_without_a_fact_about_it_the_chain_is_the_models_own(view, known):
    kind = _checking(view, ALBUM)
    empty = Factbook((), torch.zeros(0, 64), torch.zeros(0, dtype=torch.long), ())
    book = _book(view, *known) if known else empty
    kind = SelfCheck(Lookup(book, "words", GATE), kind.verdict, kind.hops)
    script = [
        "Subquestion: Whose citizen is Anna?\nGenerated answer: Chile.\n",
        "Subquestion: What is the capital of Chile?\nGenerated answer: Santiago\n",
        "Final answer: Santiago",
    ]
    found, seen = _run(kind, view, QUESTION, script)
    assert (found.text, found.chain) == ("Santiago", ("Chile", "Santiago"))
    assert (
        "does not contradict the generated answer, so the intermediate answer is: Chile"
        in (seen[1])
    )


def test_the_model_gives_the_verdict_where_it_should(view):
    """The published form: the fact is shown, what the model makes of it counts."""
    verdict = "Retrieved fact contradicts it, so the intermediate answer is: Peru\n"
    script = [
        f"Subquestion: {ASKS[0]}\nGenerated answer: Chile\n",
        f"{verdict}Subquestion: {ASKS[1]}\nGenerated answer: Lima\n",
        "Retrieved fact agrees, so the intermediate answer is: Lima.\nFinal answer: Lima",
    ]
    found, seen = _run(_checking(view, ANNA, PERU, verdict="model"), view, QUESTION, script)
    assert (found.text, found.chain) == ("Lima", ("Peru", "Lima"))
    assert seen[1].endswith("Retrieved fact: Anna is a citizen of Peru.\n")


def test_what_is_no_answer_is_told_apart(view):
    """No sub-question, or none that ends it: failed; a plain question is looked up by the gate."""
    found, _ = _run(_checking(view, PERU), view, "Who knows?", ["I do not."])
    assert (found.text, found.steps[-1].kind) == (None, "failed")
    loop = ["Subquestion: Who?\nGenerated answer: Bob\n"] * 3
    found, _ = _run(_checking(view, PERU, hops=2), view, QUESTION, loop)
    assert (found.text, found.steps[-1].text) == (None, "no final answer within 2 sub-questions")
    for kind in (_checking(view, PERU), _scoping(view, PERU)):
        found, _ = _run(kind, view, PERU.prompt, ["It rains."])
        assert found.text == "Cusco"
    found, _ = _run(_checking(view, PERU, verdict="model"), view, PERU.prompt, ["It rains."])
    assert found.text is None


def test_a_reply_is_read_up_to_its_first_sub_question():
    """What the model goes on to write without a fact is left out; nothing is read of nothing."""
    two = "Subquestion: a?\nGenerated answer: b.\nSubquestion: c?\nGenerated answer: d"
    assert Reply.read(two) == Reply("Subquestion: a?\nGenerated answer: b.\n", asked="a?", said="b")
    assert Reply.read("") == Reply("\n")
    assert labelled(" final answer : x ", "Final answer") == "x"
    assert labelled("Finally: x", "Final answer") is None


def test_the_scope_test_decides(view):
    """A hit puts the fact in as the answer, a miss lets the model answer; the entity is named."""
    found, seen = _run(
        _scoping(view, ANNA),
        view,
        QUESTION,
        [
            f"Subquestion: {ASKS[0]}\nGenerated answer: Chile",
            "Subquestion: What is the capital of Peru?\n",
            " The capital of Peru is Lima.\nIntermediate answer: Lima\nSubquestion: more",
            "Final answer: Lima",
        ],
    )
    assert (found.text, found.chain) == ("Lima", ("Peru", "Lima"))
    assert seen[0] == f"{QUESTION}\nEntity of Question: Anna\n"
    assert seen[1].endswith(
        "Generated answer: Anna is a citizen of Peru.\nIntermediate answer: Peru\n"
    )
    assert seen[3].endswith("Lima.\nIntermediate answer: Lima\n")
    assert [s.kind for s in found.steps] == ["asked", "found", "edit", "asked", "model", "answer"]


def test_of_several_candidates_the_nearest_that_passes_counts(view):
    """A nearer fact about something else does not hide the one that is asked for."""
    other = EditRequest(prompt="The capital of Chile is what", subject="Chile", target="Arica")
    kind = _scoping(view, PERU, other)
    asked = "The capital of Peru is what what?"
    first, second = kind.lookup.found(asked, view, 2)
    assert {first.near, second.near} == {True, False}
    assert kind._hit(asked, view).fact["target"] == "Cusco"
    assert kind._hit("Where is Chad?", view) is None


def test_facts_are_found_by_the_questions_that_ask_for_them(view):
    """Of a relation that is known; others stay as they are."""
    assert asked_too(PERU).rephrases == (
        "What is the capital of Peru?",
        "What is the capital of Peru?",
    )
    assert asked_too(ANNA).rephrases[0] == "What country is Anna a citizen of?"
    odd = EditRequest(prompt="Anna envies", subject="Anna", target="Bob")
    assert asked_too(odd) == odd
    assert asked_too(PERU.model_copy(update={"subject": None})).rephrases == ()


def test_examples_give_way_to_the_question(view):
    """Where the context is short the furthest go first; without room there is no text at all."""
    shown = examples("checked")
    assert len(shown) == 4
    assert all("does not contradict" in example for example in shown)
    rest = "Question: why?"
    whole = fitted("checked", rest, view, 5)
    assert whole == "\n\n".join((*shown, rest))
    view.limits.positions = len(shown[-1].split()) + len(rest.split()) + 5
    assert fitted("checked", rest, view, 5) == f"{shown[-1]}\n\n{rest}"
    view.limits.positions = 6
    assert fitted("checked", rest, view, 5) is None
    found, _ = _run(_checking(view, PERU), view, QUESTION, [])
    assert found.steps[-1].text == "the text has outgrown the model's context"


@pytest.mark.parametrize("make", ["selfcheck", "scoped"])
def test_files_joining_and_damage(view, make, tmp_path, known):
    """Read back the same; a later patch's fact of one prompt counts, its removal undoes it."""

    def made(*requests):
        if make == "selfcheck":
            return selfcheck(_book(view, *requests), "words", GATE, "gate", 4)
        return scoped(_book(view, *requests), "words", GATE, 5)

    model = known("llama")
    patch = Patch(provenance(model, PERU), procedure=made(PERU, ANNA))
    again = Patch.load(patch.save(tmp_path / "p")).procedure
    kind = SelfCheck if make == "selfcheck" else Scoped
    check_procedure(again)
    newer = made(PERU.model_copy(update={"target": "Puno"}))

    def said(*procedures):
        return _run(kind.join(procedures), view, PERU.prompt, ["."])[0].text

    assert [said(again), said(again, newer), said(newer, again)] == ["Cusco", "Puno", "Cusco"]
    left = kind.without(again, [ANNA.prompt])
    check_procedure(left)
    assert [fact["prompt"] for fact in left.data["facts"]] == [PERU.prompt]
    bad = [{"hops": 0}, {"hops": True}, {"facts": []}, {"named": "x"}, {"more": 1}]
    for change in bad + ([{"verdict": "toss"}] if make == "selfcheck" else []):
        with pytest.raises(PatchError, match="damaged procedure of kind"):
            kind.check(Procedure(again.kind, {**again.data, **change}, again.tensors))
    with pytest.raises(PatchError, match="damaged procedure"):
        kind.check(Procedure(again.kind, again.data, {}))
