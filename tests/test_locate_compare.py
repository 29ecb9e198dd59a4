"""Related and unrelated prompts: the card's numbers, plain loops, the command."""

from __future__ import annotations

import json
import random

import pytest
import tiny
import torch
from shell import run as shell

from knowpatch.data.source import load
from knowpatch.edited import EditedModel
from knowpatch.errors import DataError, OptionError, RequestError
from knowpatch.locate.attribution import attribute as attribute_patching
from knowpatch.locate.compare import (
    CHAIN,
    FACT,
    NONSENSE,
    RELATION,
    SUBJECT,
    compare,
    compared,
    variants,
)
from knowpatch.locate.facts import Fact, _of_cases, read_facts
from knowpatch.locate.locators import Locator, answer_of, located, locator
from knowpatch.locate.noise import Noise
from knowpatch.locate.overlap import combined, highest, overlap, pearson, ranks, rsim, spearman
from knowpatch.locate.tracing import Tracing
from knowpatch.parts.attribution import attribute

FACTS = [
    Fact("The capital of France is", "France", "Paris", rephrases=("France's capital is",)),
    Fact("The language of Brazil is", "Brazil", "Portuguese", chains=("In Brazil people speak",)),
    Fact("The colour of the sky is", "sky", "blue"),
    Fact("The capital of Japan is", "Japan", "Tokyo"),
]


# -- numbers ---------------------------------------------------------------------------------------


def test_rsim_by_hand():
    """.8 over .5 is .6; below all pairs it is 0; where all pairs are alike it is 0."""
    assert rsim(0.8, 0.5) == pytest.approx(0.6)
    assert rsim(0.4, 0.5) == 0
    assert rsim(1, 1) == 0
    assert combined({"related": 0.8, "every": 0.5}) == pytest.approx(0.6)
    assert combined({"every": 0.5}) is None


def test_overlap_of_the_highest():
    """{1, 2, 3} and {2, 3, 4} have two thirds; equals go to the lower block."""
    one = torch.tensor([[0.0, 3, 2, 1, 0]])
    other = torch.tensor([[0.0, 0, 1, 2, 3]])
    assert overlap(one, other, 3).tolist() == [[pytest.approx(2 / 3)]]
    assert highest(torch.zeros(1, 4), 2).tolist() == [[1, 1, 0, 0]]


def test_correlations_by_hand():
    """(0, 1, 2, 1, 0): with its double 1, with its opposite -1; a flat row with nothing."""
    a = torch.tensor([[0.0, 1, 2, 1, 0]])
    both = torch.cat([2 * a, 2 - a, torch.ones(1, 5)])
    assert pearson(a, both)[0].tolist() == pytest.approx([1, -1, 0])
    assert ranks(a).tolist() == [[1.5, 3.5, 5, 3.5, 1.5]]
    assert spearman(a, both.exp())[0].tolist() == pytest.approx([1, -1, 0])


def test_ranks_are_scipys():
    """Average ranks, ties and all."""
    values = torch.tensor([[2.0, 7, 7, 1, 3, 7]])
    assert ranks(values).tolist() == [[2, 5, 5, 1, 3, 5]]


# -- prompts ---------------------------------------------------------------------------------------


def test_variants_of_a_fact():
    """Data's own wordings keep the answer; what is made has none."""
    made = variants(FACTS)
    assert made[0][FACT] == [Fact("France's capital is", "France", "Paris")]
    assert made[1][CHAIN] == [Fact("In Brazil people speak", "Brazil")]
    assert made[0][RELATION] == [Fact("The capital of Brazil is", "Brazil")]
    assert made[0][SUBJECT] == [Fact("The language of France is", "France")]
    # Japan's next fact is France's, which asks the same: the one after it is taken.
    assert made[3][SUBJECT] == [Fact("The language of Japan is", "Japan")]
    (salad,) = made[2][NONSENSE]
    assert sorted(salad.prompt.split()) == sorted(FACTS[2].prompt.split())
    assert salad.prompt != FACTS[2].prompt
    assert variants(FACTS) == made
    assert made[0][CHAIN] == []
    with pytest.raises(DataError, match="2 facts cannot be compared"):
        variants(FACTS[:2])


def test_facts_bring_their_wordings(tmp_path):
    """Of a file and of cases; one without the subject is refused by its place, or left out."""
    path = tmp_path / "facts.jsonl"
    line = {"prompt": FACTS[0].prompt, "subject": "France", "rephrases": ["France's capital is"]}
    path.write_text(json.dumps({**line, "chains": ["Who rules France?"]}))
    (fact,) = read_facts(path)
    assert fact.rephrases == ("France's capital is",)
    assert fact.chains == ("Who rules France?",)
    path.write_text(json.dumps({**line, "rephrases": ["Its capital is"]}))
    with pytest.raises((DataError, RequestError), match="line 1: subject 'France' is not in"):
        read_facts(path)
    probes = [
        {"kind": "rephrase", "prompt": "France's capital is", "answers": "Rome", "request": 0},
        {"kind": "rephrase", "prompt": "Its capital is", "answers": "Rome", "request": 0},
        {"kind": "multihop", "prompt": "The mayor of the capital of France is", "answers": "Anna"},
    ]
    request = {"prompt": FACTS[0].prompt, "subject": "France", "target": "Rome", "old": "Paris"}
    case = {"id": "1", "requests": [request], "probes": probes}
    path.write_text(json.dumps(case))
    (fact,) = _of_cases("cases", load(str(path)).cases)
    assert (fact.answer, fact.rephrases) == ("Paris", ("France's capital is",))
    assert fact.chains == ("The mayor of the capital of France is",)


# -- comparing -------------------------------------------------------------------------------------


def _compare(own, made):
    """With facts that have nothing in common."""
    return compare(own, made, [[i != j for j in range(len(own))] for i in range(len(own))])


def _curves(count, blocks=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, blocks, generator=generator))


def test_a_locator_that_finds_the_fact_is_told_from_one_that_finds_the_subject():
    """Rephrases like the fact and the subject's other facts elsewhere; and both alike."""
    own, other = _curves(30), _curves(30, seed=1)
    near = [x + 0.01 * y for x, y in zip(own, other, strict=True)]
    made = [{FACT: [a], SUBJECT: [b]} for a, b in zip(near, other, strict=True)]
    found = _compare(own, made)
    assert found.kinds[FACT].rsim[2].mean > 0.9
    assert found.kinds[SUBJECT].rsim[2].mean < 0.3
    assert found.kinds[FACT].correlation.mean > 0.95
    assert found.difference.difference.low > 0
    assert found.verdict.startswith("what is located belongs to the fact")
    both = _compare(own, [{FACT: [a], SUBJECT: [a]} for a in near])
    assert both.verdict.startswith("what is located does not tell")
    none = _compare(own, [{SUBJECT: [a]} for a in near])
    assert "cannot be told" in none.verdict


def test_rsim_is_the_plain_double_loop():
    """Over facts and pairs of facts, with sets."""
    own, other = _curves(6), _curves(6, seed=3)
    found = _compare(own, [{FACT: [x]} for x in other]).kinds[FACT]

    def top(scores, n):
        return set(sorted(range(8), key=lambda i: (-float(scores[i]), i))[:n])

    for n in range(1, 8):
        related = sum(len(top(own[i], n) & top(other[i], n)) / n for i in range(6)) / 6
        pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
        every = sum(len(top(own[i], n) & top(own[j], n)) / n for i, j in pairs) / len(pairs)
        assert found.rsim[n - 1].mean == pytest.approx(rsim(related, every), abs=1e-6)


def test_the_same_blocks_for_everything_are_no_likeness():
    """A locator that always says the same has RSim 0, whatever it correlates with."""
    same = [torch.arange(8.0)] * 5
    found = _compare(same, [{FACT: [same[0]]}] * 5).kinds[FACT]
    assert {summary.mean for summary in found.rsim} == {0.0}
    assert found.rsim_ranks.mean == 0
    assert found.peak.mean == 7


def test_all_pairs_are_those_with_nothing_in_common():
    """Facts that are alike, and one apart: only pairs with that one count."""
    near, far = torch.arange(8.0), torch.arange(8.0).flip(0)
    own = [near, near, near, far]
    apart = [[(i == 3) != (j == 3) for j in range(4)] for i in range(4)]
    made = [{FACT: [near]}, {FACT: [far]}] * 2
    assert compare(own, made, apart).kinds[FACT].rsim[0].mean == pytest.approx(0.75)  # over 0
    assert _compare(own, made).kinds[FACT].rsim[0].mean == pytest.approx(0.5)  # over a half
    with pytest.raises(DataError, match="no two facts differ"):
        compare(own, [{FACT: [one]} for one in own], [[False] * 4] * 4)


def test_what_cannot_be_located_is_left_out_and_counted():
    """Facts and prompts; too few that can be are refused."""
    own = [*_curves(4), None]
    made = [{FACT: [torch.rand(8)], SUBJECT: [None]} for _ in range(5)]
    found = _compare(own, made)
    assert (found.facts, found.left_out) == (4, 6)
    assert SUBJECT not in found.kinds
    with pytest.raises(DataError, match="only 2 facts"):
        _compare([*_curves(2), None], made[:3])


# -- locating --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_blocks_are_scored_by_their_neurons(known, architecture):
    """The sum of what speaks for the answer; without an answer for the likeliest token."""
    model = known(architecture)
    view, fact = model.view, FACTS[0]
    (scores,) = located(view, locator("neurons"), [fact])
    ids = view.encode(fact.prompt).ids
    token = answer_of(view, fact)
    assert view.decode(token).strip() == "Paris"
    read = attribute(view, range(4), ids, token, points=5)
    plain = [float(one.clamp(min=0).sum()) for one in read.scores.values()]
    assert scores.tolist() == pytest.approx(plain, rel=1e-5)
    assert answer_of(view, Fact(fact.prompt, fact.subject)) == token


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_blocks_are_scored_by_restorations_at_the_subject(known, architecture):
    """The row of the whole map for the subject's last token, exact and by estimate."""
    model = known(architecture)
    view, fact, noise = model.view, FACTS[0], Noise.of(model.view)
    whole = Tracing(view, fact, noise, kind="mlp").trace()
    assert whole.high - whole.low > 0.05
    last = whole.corruption.subject[1] - 1
    exact, estimate = (
        located(view, locator(name), [fact])[0] for name in ("tracing", "attribution")
    )
    assert torch.allclose(exact, whole.effects_TL[last], atol=1e-5)
    plain = attribute_patching(view, fact, noise, kind="mlp").effects_TL[last]
    assert torch.allclose(estimate, plain, atol=1e-5)


def test_what_the_subject_has_little_to_do_with_is_not_located():
    """A model that knows nothing has no effect to restore, and no scores."""
    view = EditedModel.of(*tiny.fresh("llama")).view
    gap = Tracing(view, FACTS[0], Noise.of(view), kind="mlp").runs
    assert gap.high - gap.low < 0.05
    assert located(view, locator("tracing"), FACTS[:1]) == [None]
    assert located(view, locator("attribution"), FACTS[:1]) == [None]


def test_what_was_located_is_kept(known):
    """By model, locator and prompt: the second time nothing is computed."""
    view, calls = known("llama").view, []

    def score(_view, fact, answer):
        calls.append((fact.prompt, answer))
        return None if "sky" in fact.prompt else torch.tensor([1.0, 2.0])

    how = Locator(f"test {random.random()}", "", {}, score)
    first = located(view, how, [*FACTS[:3], FACTS[0]])
    assert len(calls) == 3
    assert first[2] is None
    assert torch.equal(first[0], first[3])
    again = located(view, how, FACTS[:3])
    assert len(calls) == 3
    assert again[2] is None
    assert torch.equal(first[0], again[0])


def test_an_unknown_locator_is_refused():
    """With what there is."""
    with pytest.raises(OptionError, match="did you mean 'neurons'"):
        locator("neuron")


def test_comparing_by_a_given_locator(known):
    """Facts in, kinds out: a locator that sees the subject alone."""

    def by_subject(view, fact, answer):
        return torch.rand(8, generator=torch.Generator().manual_seed(len(fact.subject)))

    how = Locator(f"test {random.random()}", "", {}, by_subject)
    facts = [*FACTS, Fact("The Nile flows through", "Nile", "Egypt", rephrases=("Nile waters:",))]
    found = compared(known("llama").view, how, facts)
    assert found.kinds[FACT].correlation.mean == pytest.approx(1)
    assert found.kinds[SUBJECT].correlation.mean == pytest.approx(1)
    assert found.kinds[RELATION].correlation.mean < 0.9
    assert "does not tell the fact" in found.verdict


def test_the_command_shows_draws_and_refuses(folder, tmp_path):
    """A table, a verdict, a picture, JSON; a missing file and an unknown locator in one line."""
    path = tmp_path / "facts.jsonl"
    lines = [
        {"prompt": f.prompt, "subject": f.subject, "answer": f.answer, "rephrases": f.rephrases}
        for f in FACTS
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    asked = ("locate", "compare", path, "--model", folder)
    shown = shell(*asked, "--out", "c.png", cwd=tmp_path)
    assert shown.code == 0, shown
    assert "same subject" in shown.out
    assert "4 facts of 4 asked" in shown.out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    told = shell(*asked, "--json", cwd=tmp_path).json()
    assert told["kinds"]["same fact"]["prompts"] == 1
    assert len(told["own"]["curve"]) == 4
    for wrong, words in (
        (("locate", "compare", "none.jsonl", "--model", folder), "no such file"),
        ((*asked, "--by", "luck"), "unknown locator 'luck'"),
        ((*asked, "--limit", "2"), "2 facts cannot be compared"),
    ):
        refused = shell(*wrong, cwd=tmp_path)
        assert refused.code == 2
        assert words in refused.complaints[-1]
