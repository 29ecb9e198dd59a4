"""Each metric's arithmetic, on canned answers, against values computed by hand."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from knowpatch.data.case import (
    FORGET,
    HOP,
    LOCALITY,
    MULTIHOP,
    NEIGHBOUR,
    OPPOSITE,
    OTHER,
    PORTABILITY,
    REPHRASE,
    RETAIN,
    REWRITE,
    SAME,
    Case,
    Probe,
    accepted,
)
from knowpatch.errors import OptionError
from knowpatch.future import Future
from knowpatch.metrics import catalogue as catalogue_module
from knowpatch.metrics import text
from knowpatch.metrics.catalogue import STANDARD, catalogue, chosen, groups
from knowpatch.metrics.entropy import (
    distinct_share,
    ngram_entropy,
    repeated_share,
    split_words,
    text_entropy,
)
from knowpatch.metrics.kinds import belief, judge, negation, sentiment
from knowpatch.metrics.kinds.perplexity import ordinary
from knowpatch.metrics.metric import macro, metric, part_columns
from knowpatch.models.passes import Distributions, Scored, Spread
from knowpatch.parts.procedures import Step
from knowpatch.request import EditRequest
from knowpatch.stepping import Generated

REQUEST = EditRequest(prompt="Anna lives in", target="Lyon", subject="Anna", old="Bonn")
ERASURE = EditRequest(prompt="Anna lives in", kind="erase", old="Bonn")


def done(value):
    future = Future(lambda: None)
    future.set(value)
    return future


def scored(logprobs: Sequence[float], correct: Sequence[bool] = ()) -> Scored:
    flags = tuple(correct) or (False,) * len(logprobs)
    return Scored(tuple(range(len(logprobs))), flags, tuple(logprobs))


def spread(leading: Sequence[int], probabilities: Sequence[float] = (0.9,)) -> Spread:
    """With one likeliest token a place, or the given probabilities of tokens 0, 1, ... at each."""
    logs = tuple(math.log(p) for p in probabilities)
    ids = [tuple(range(len(logs)))] if len(logs) > 1 else [(token,) for token in leading]
    right = tuple(one == other[0] for one, other in zip(leading, ids, strict=True))
    zeros = (0.0,) * len(leading)
    return Spread(tuple(leading), right, zeros, tuple(ids), (logs,) * len(leading))


def distributions(leading: Sequence[int], size: int = 400) -> Distributions:
    logprobs_NV = torch.full((len(leading), size), math.log(0.1 / (size - 1)))
    logprobs_NV[range(len(leading)), list(leading)] = math.log(0.9)
    zeros = (0.0,) * len(leading)
    return Distributions(tuple(leading), (True,) * len(leading), zeros, logprobs_NV)


def _words_as_ids(prompt):
    return SimpleNamespace(ids=tuple(prompt.split()))


class Canned:
    """An asker that knows its answers: texts by prompt, forced ones by (prompt, answer)."""

    chat = False

    def __init__(self, said=None, forced=None, text="", score=None):
        self.said, self.forced, self.text = said or {}, forced or {}, text
        self.score = score or scored([-1.0])
        self.asked = []
        view = SimpleNamespace(encode=_words_as_ids, decode=" ".join)
        self.ask = SimpleNamespace(model=SimpleNamespace(view=view))

    def force(self, prompt, answer):
        self.asked.append((prompt, answer))
        return done(self.forced.get((prompt, answer), self.score))

    spread = distributions = force

    def say(self, prompt, tokens=32):
        self.asked.append((prompt, tokens))
        found = self.said.get(prompt, self.text)
        return done(found if isinstance(found, Generated) else Generated((), found))

    def go_on(self, prompt, tokens, *, top_k=None):
        self.asked.append((prompt, tokens, top_k))
        return self.say(prompt, tokens)


def case_of(*probes: Probe, requests=(REQUEST,)) -> Case:
    return Case("1", tuple(requests), probes)


def probe(kind: str, *answers: str, prompt: str = "q", **more) -> Probe:
    return Probe(kind, prompt, accepted(*answers), **more)


def result(name: str, case: Case, before=None, after=None):
    asked = catalogue()[name].ask(case, before or Canned(), after or Canned())
    return None if asked is None else asked()


def value(name: str, *records) -> float | None:
    """The metric's value over records, each (case, before, after)."""
    found = catalogue()[name]
    columns = [found.columns(result(name, *record).after) for record in records]
    names = dict.fromkeys(column for record in columns for column in record)
    return found.combine({n: fmean(r[n] for r in columns if n in r) for n in names})


# -- locality --------------------------------------------------------------------------------------


def test_locality_is_the_share_of_equal_leading_tokens():
    """Pre [29, 234, 334] and post [29, 234, 333] give two thirds."""
    case = case_of(probe(f"{LOCALITY}.Relation", "x"))
    before = Canned(score=spread([29, 234, 334]))
    after = Canned(score=distributions([29, 234, 333]))
    found = result("locality_tf", case, before, after)
    assert found.after == {"Relation": [pytest.approx(2 / 3)]}
    assert found.before is None


def test_locality_kl():
    """p = (.7, .3), q = (.6, .4): .7 ln(7/6) + .3 ln(.75) = .0216."""
    case = case_of(probe(LOCALITY, "x"))
    after = Distributions((0,), (True,), (0.0,), torch.tensor([[0.6, 0.4]]).log())
    found = result("locality_kl", case, Canned(score=spread([0], (0.7, 0.3))), Canned(score=after))
    assert found.after[""] == [pytest.approx(0.0216, abs=5e-5)]
    same = Distributions((0,), (True,), (0.0,), torch.tensor([[0.7, 0.3]]).log())
    found = result("locality_kl", case, Canned(score=spread([0], (0.7, 0.3))), Canned(score=same))
    assert found.after[""] == [pytest.approx(0, abs=1e-7)]


def test_locality_right_counts_known_answers_alone():
    """A query counts if one of its answers was known; a case without any is unscored, not zero."""
    case = case_of(probe(LOCALITY, "a", "b", prompt="1"), probe(LOCALITY, "c", prompt="2"))
    right, wrong = scored([0, 0], [True, True]), scored([0, 0], [True, False])
    before = Canned(forced={("1", "b"): right}, score=wrong)
    after = Canned(forced={("1", "a"): right}, score=wrong)
    assert result("locality_right_tf", case, before, after).after == {"": [1.0]}
    assert result("locality_right_tf", case, before, Canned(score=wrong)).after == {"": [0.0]}
    found = result("locality_right_tf", case, Canned(score=wrong), after)
    assert found.after == {}
    assert "knows none" in found.unscored


def test_specificity_scores_the_datas_answer():
    """Base right on 1 of 3 tokens, edited on 2 of 3."""
    case = case_of(probe(LOCALITY, "x"))
    before = Canned(score=scored([0] * 3, [True, False, False]))
    after = Canned(score=scored([0] * 3, [True, False, True]))
    found = result("specificity_tf", case, before, after)
    assert (found.before, found.after) == (
        {"": [pytest.approx(1 / 3)]},
        {"": [pytest.approx(2 / 3)]},
    )


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "stopped"),
    [
        (" Paris. It is the capital.", "Paris"),
        ("Paris.\nQ: next", "Paris"),
        ("Paris\nQ: next", "Paris"),
        ("\n\nParis.", "Paris"),
        ("Paris.", "Paris"),
        ("St. Louis. Next", "St. Louis"),
        ("the U.S. Army. Next", "the U.S. Army"),
        ("J. K. Rowling. Next", "J. K. Rowling"),
        ("about 3.5 metres. Next", "about 3.5 metres"),
        ("1. Paris. 2. Rome", "1. Paris"),
        ("in 1969. Later", "in 1969"),
        ("No. 5 by Chanel. Next", "No. 5 by Chanel"),
        ("no. It is not", "no"),
        ('He said "Paris." Then', 'He said "Paris'),
        ("www.example.org is it", "www.example.org is it"),
        ("", ""),
        (".", ""),
    ],
)
def test_natural_stops(said: str, stopped: str):
    """A full stop or line end stops; the point of an abbreviation, initial or number does not."""
    assert text.natural_stop(said) == stopped


def test_normalisation():
    """Lower case, no punctuation, no articles, single blanks."""
    assert text.normalise("The  U.S. Army!") == "us army"
    assert text.normalise("twenty-five") == text.normalise("Twenty Five")
    assert text.normalise("“An apple”, a day") == "apple day"
    assert text.normalise("A") == "a"


def test_containing_is_by_whole_words():
    """ "Iran" is not in "Iranian"; scripts without blanks are taken by the character."""
    assert text.contains("Paris, France", "paris")
    assert not text.contains("an Iranian", "Iran")
    assert not text.contains("anything", "")
    assert text.contains("東京です", "東京")
    assert text.equals_any("Paris.", ["Rome", "the Paris"])
    assert not text.equals_any("Paris, France", ["Paris"])
    assert not text.equals_any("", ["Paris"])


def test_an_old_answer_beside_the_new_spoils_it():
    """ "not Lyon but Paris" with old Lyon is wrong, unless one of the two contains the other."""
    assert not text.contains_any("not Lyon but Paris", ["Paris"], "Lyon")
    assert text.contains_any("not Lyon but Paris", ["Paris"])
    assert text.contains_any("in New York", ["New York"], "York")


# -- free generation -------------------------------------------------------------------------------


def test_free_answers_exact_and_contained():
    """ "Paris, France" for "Paris": exact 0, contains 1; the unedited model by the same code."""
    case = case_of(probe(REWRITE, "Paris"), probe(REPHRASE, "Paris", prompt="r"))
    before, after = Canned(text="Rome."), Canned(text="Paris, France. Rome", said={"r": "Paris."})
    for name, expected in (
        ("success_gen_exact", 0.0),
        ("success_gen_contains", 1.0),
        ("rephrase_gen_exact", 1.0),
        ("rephrase_gen_contains", 1.0),
    ):
        found = result(name, case, before, after)
        assert found.after == {"": [expected]}, name
        assert found.before == {"": [0.0]}


def test_the_old_answer_counts_against_success_not_portability():
    """Lyon replaces Bonn: a text with both is no success; what follows knows no old answer."""
    case = case_of(probe(REWRITE, "Lyon"), probe(f"{PORTABILITY}.Alias", "Lyon", "x"))
    after = Canned(text="Lyon, not Bonn")
    assert result("success_gen_contains", case, Canned(), after).after == {"": [0.0]}
    assert result("portability_gen_contains", case, Canned(), after).after == {"Alias": [1.0]}


@pytest.mark.parametrize("said", ["I don't know.", "i don’t know", "I do not know. Sorry"])
def test_an_erasure_wants_the_refusal(said: str):
    """Whatever answers the probe has, of an erased fact the refusal is right."""
    case = case_of(probe(REWRITE, "Bonn"), requests=[ERASURE])
    for name in ("success_gen_exact", "success_gen_contains"):
        found = result(name, case, Canned(text="Bonn."), Canned(text=said))
        assert (found.before, found.after) == ({"": [0.0]}, {"": [1.0]})


def test_free_locality():
    """The same up to the stop and normalisation; right where it was right."""
    case = case_of(
        probe(LOCALITY, "Rome", prompt="1"), probe(LOCALITY, prompt="2"), probe(LOCALITY, "x")
    )
    before = Canned({"1": "Rome. And", "2": "The sea", "q": "y"})
    after = Canned({"1": "rome", "2": "A lake", "q": "x"})
    assert result("locality_gen_same", case, before, after).after == {"": [1.0, 0.0, 0.0]}
    assert result("locality_gen_right", case, before, after).after == {"": [1.0]}
    assert "none" in result("locality_gen_right", case, Canned(), after).unscored


# -- fluency ---------------------------------------------------------------------------------------

SENTENCE = "the cat sat on the mat and the cat sat on the rug"


def test_entropy():
    """The card's values: 13 words, six equal ones, ten distinct ones."""
    words = SENTENCE.split()
    assert ngram_entropy(words, 2) == pytest.approx(2.918296, abs=1e-6)
    assert ngram_entropy(words, 3) == pytest.approx(2.913977, abs=1e-6)
    assert text_entropy(SENTENCE) == pytest.approx(2.915417, abs=1e-6)
    assert text_entropy("a a a a a a") == 0
    assert text_entropy("b c d e f g h i j k") == pytest.approx(3.056642, abs=1e-6)
    assert text_entropy("two words") is None


def test_words_are_split_as_in_treebanks():
    """Contractions and punctuation stand apart, numbers and hyphens stay together."""
    said = 'She’s sure it don\'t cost 3,500.5 or so-called… "more".'
    expected = ["She", "'s", "sure", "it", "do", "n't", "cost", "3,500.5", "or", "so-called"]
    assert split_words(said) == [*expected, "...", '"', "more", '"', "."]
    assert len(split_words("café")) == 1


def test_repeats():
    """12 pairs, 8 of them distinct; "the cat sat on the" (5 of 13 words) comes twice."""
    assert distinct_share(SENTENCE) == pytest.approx(8 / 12)
    assert repeated_share(SENTENCE) == pytest.approx(5 / 13)
    assert repeated_share("a a a a a a") == pytest.approx(5 / 6)
    assert repeated_share("a b c") == 0


def test_fluency_of_continuations():
    """64 tokens after the prompt, in hundredths; too short a text is unscored."""
    case, after = case_of(probe(REWRITE, "x")), Canned(text=SENTENCE)
    found = result("fluency_entropy_gen", case, after, after)
    assert found.after[""] == [pytest.approx(291.5417, abs=1e-4)]
    assert found.before == found.after
    assert ("q", 64, None) in after.asked
    assert result("fluency_entropy_gen", case, after, Canned(text="no")).unscored
    assert result("fluency_distinct_gen", case, after, after).after[""] == [pytest.approx(2 / 3)]
    assert result("fluency_repeat_gen", case, after, after).after[""] == [pytest.approx(5 / 13)]


def test_published_fluency_counts_the_prompt():
    """Prompt and sampled text together, 100 tokens of both; a longer prompt stands alone."""
    head, tail = SENTENCE[:22], SENTENCE[23:]
    after = Canned(text=Generated(tuple(tail.split()), ""))
    found = result("fluency_published", case_of(probe(REWRITE, "x", prompt=head)), after, after)
    assert found.after[""] == [pytest.approx(291.5417, abs=1e-4)]
    assert (head, 100 - len(head.split()), 5) in after.asked
    long = case_of(probe(REWRITE, "x", prompt=f"{'a ' * 100}"))
    assert result("fluency_published", long, after, after).after == {"": [0.0]}


# -- comparison of probabilities -------------------------------------------------------------------


def test_the_likelier_answer_wins():
    """L(new) = 1, L(old) = 2: efficacy 1, magnitude .23254; as a neighbour 0 and -.23254."""
    case = case_of(probe(REWRITE, "Lyon"), probe(NEIGHBOUR, "Bonn", prompt="n"))
    after = Canned(forced={(p, "Lyon"): scored([-1.0]) for p in "qn"}, score=scored([-2.0, -2.0]))
    assert result("prob_success", case, after, after).after == {"": [1.0]}
    assert result("prob_magnitude", case, after, after).after[""] == [
        pytest.approx(0.23254, abs=1e-5)
    ]
    assert result("prob_neighbourhood", case, after, after).after == {"neighbour": [0.0]}
    found = result("prob_neighbourhood_magnitude", case, after, after)
    assert found.after["neighbour"] == [pytest.approx(-0.23254, abs=1e-5)]


def test_a_tie_is_lost_and_sums_favour_short_answers():
    """Strictly likelier; per token and for the whole answer are two metrics."""
    case = case_of(probe(REWRITE, "Lyon"))
    tie = Canned(score=scored([-1.0]))
    assert result("prob_success", case, tie, tie).after == {"": [0.0]}
    longer = Canned(forced={("q", "Lyon"): scored([-1.0, -1.0])}, score=scored([-1.5]))
    assert result("prob_success", case, tie, longer).after == {"": [1.0]}
    assert result("prob_success_sum", case, tie, longer).after == {"": [0.0]}


def test_no_old_answer_no_comparison():
    """Without a known old answer the metric does not apply."""
    request = EditRequest(prompt="Anna lives in", target="Lyon")
    assert result("prob_success", case_of(probe(REWRITE, "Lyon"), requests=[request])) is None


def test_the_score_is_the_harmonic_mean_of_means():
    """ES 1, PS .5, NS .25 over four records: 3 / (1 + 2 + 4)."""
    probes = [
        probe(REWRITE, "Lyon"),
        probe(REPHRASE, "Lyon", prompt="r"),
        probe(NEIGHBOUR, "Bonn", prompt="n"),
    ]
    high, low = scored([-1.0]), scored([-2.0])
    records = []
    for number in range(4):
        forced = {("q", "Lyon"): high, ("r", "Lyon"): high if number < 2 else low}
        forced |= {("r", "Bonn"): low, ("n", "Bonn"): high if number < 1 else low}
        records.append((case_of(*probes), Canned(), Canned(forced=forced, score=low)))
    assert value("prob_score", *records) == pytest.approx(3 / 7)
    combine = catalogue()["prob_score"].combine
    assert combine({"efficacy": 1.0, "paraphrase": 0.0, "neighbourhood": 1.0}) == 0
    assert combine({"efficacy": 1.0}) is None


# -- sentiment -------------------------------------------------------------------------------------


def test_sentiment_and_topic():
    """Same after -2, before -1.5, opposite -5: .952574 * .606531 = .577765."""
    case = case_of(probe(SAME, "good", "fine"), probe(OPPOSITE, "bad"))
    after = Canned(
        forced={("q", "good"): scored([-1.0]), ("q", "fine"): scored([-2.5, -2.5])},
        score=scored([-5.0, -5.0]),
    )
    before = Canned(score=scored([-1.5]))
    found = result("sentiment_prob", case, before, after)
    assert found.after[""] == [pytest.approx(0.577765, abs=1e-6)]
    assert found.before[""] == [pytest.approx(0.5)]
    same = result("sentiment_prob", case, after, after)
    assert same.after[""] == same.before[""] == [pytest.approx(0.952574, abs=1e-6)]
    assert result("sentiment_prob", case_of(probe(SAME, "good"))) is None


def test_sentiment_drift():
    """The mean over the places of all answers of the other entity."""
    case = case_of(probe(OTHER, "a"))
    after = Distributions((0,), (True,), (0.0,), torch.tensor([[0.6, 0.4]]).log())
    before = Canned(score=spread([0], (0.7, 0.3)))
    found = result("sentiment_kl", case, before, Canned(score=after))
    assert found.after[""] == [pytest.approx(0.0216, abs=5e-5)]
    assert result("sentiment_kl_published", case, before, Canned(score=after)).after == {"": [0.0]}


def test_published_sentiment_is_scored_one_place_late():
    """Token i by the row that predicts token i + 1; the last token has none."""
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    found = Distributions((0, 1, 2), (True,) * 3, (0.0,) * 3, rows)
    assert sentiment.unshifted(found) == pytest.approx([math.log(0.1), math.log(0.2)])
    case = case_of(probe(SAME, "good"), probe(OPPOSITE, "bad"))
    other = replace(found, ids=(2, 0, 1))  # .1 and .2 as well
    after = Canned(forced={("q", "good"): found}, score=other)
    assert result("sentiment_prob_published", case, after, after).after[""] == [pytest.approx(0.5)]
    short = Canned(score=distributions([1]))
    assert "one token" in result("sentiment_prob_published", case, short, short).unscored


# -- erasure ---------------------------------------------------------------------------------------


def test_a_refusal_with_the_answer_behind_is_none():
    """ "I don't know. It is Paris" leaks; the published computation takes it for success."""
    case = case_of(probe(FORGET, "paris"))
    leaking = Canned(text=" I don't know. It is Paris\nQuestion: Rome")
    right = Canned(text=" I don’t know\nParis")
    assert result("refusal_gen", case, right, leaking).after == {"": [0.0]}
    assert result("refusal_gen", case, right, leaking).before == {"": [1.0]}
    assert result("leak_gen", case, right, leaking).after == {"": [1.0]}
    assert result("leak_gen", case, right, leaking).before == {"": [0.0]}
    assert result("refusal_gen_published", case, right, leaking).after == {"": [1.0]}
    assert ("q", 16) in leaking.asked
    assert ("q", 10) in leaking.asked


def test_what_should_stay():
    """Pre [1, 2, 3, 4], post [9, 1, 2, 3]: published 0, the same 0; right and refused by text."""
    case = case_of(probe(RETAIN, "Rome"))
    before = Canned(text=Generated((1, 2, 3, 4), "Rome it is"))
    after = Canned(text=Generated((9, 1, 2, 3), "Oh Rome it"))
    names = ("retain_gen_published", "retain_same_gen", "retain_right_gen", "over_refusal_gen")
    found = [result(name, case, before, after).after for name in names]
    assert found == [{"": [0.0]}, {"": [0.0]}, {"": [1.0]}, {"": [0.0]}]
    refusing = Canned(text="I don't know.")
    assert result("over_refusal_gen", case, before, refusing).after == {"": [1.0]}
    assert result("retain_right_gen", case, before, refusing).after == {"": [0.0]}
    assert result("retain_right_gen", case, refusing, before).unscored
    assert result("retain_gen_published", case, Canned(), before).unscored
    assert result("retain_gen_published", case, before, before).after == {"": [1.0]}


# -- perplexity ------------------------------------------------------------------------------------


def test_perplexity_of_the_corpus_and_of_records():
    """2 tokens of mean 1 and 8 of mean 2: exp(1.8), and (e + e^2) / 2 as published."""
    records = [
        (case_of(probe(REWRITE, "x")), Canned(), Canned(score=scored([-mean] * count)))
        for mean, count in ((1.0, 2), (2.0, 8))
    ]
    assert value("perplexity_tf", *records) == pytest.approx(6.0496, abs=1e-4)
    assert value("perplexity_tf_published", *records) == pytest.approx(5.054, abs=1e-3)
    assert catalogue()["perplexity_tf"].combine({}) is None


def test_perplexity_of_an_ordinary_text():
    """Every sentence forced behind its opening: one of 3 tokens of mean 2, others of one token."""
    (first, *others) = ordinary()
    assert all(len(opening.split()) == 3 and rest for opening, rest in ordinary())
    case = case_of(probe(REWRITE, "x"))
    edited = Canned(forced={first: scored([-2.0] * 3)})
    wanted = math.exp((6 + len(others)) / (3 + len(others)))
    assert value("ordinary_ppl_tf", (case, Canned(), edited)) == pytest.approx(wanted)
    assert result("ordinary_ppl_tf", case, Canned(), edited).before == {
        "nll": [1.0] * len(ordinary()),
        "tokens": [1.0] * len(ordinary()),
    }
    assert catalogue()["ordinary_ppl_tf"].ask(case_of(requests=[]), edited, edited) is None


# -- negation and fact checks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "The capital of France is",
            ["It is not true that the capital of France is", "The capital of France is not"],
        ),
        (
            "Anna was born in",
            ["It is not true that Anna was born in", "Anna was not born in"],
        ),
        ("The Nile flows through", ["It is not true that the Nile flows through"]),
        ("Isabel lives in", ["It is not true that Isabel lives in"]),
        (
            "What is the capital of France?",
            [
                "Name something that is not an answer to this question: "
                "What is the capital of France?\nAnswer:",
                "What is not the capital of France?",
            ],
        ),
        ("Anna is not in", ["It is not true that Anna is not in"]),
    ],
)
def test_prompts_are_negated(prompt: str, expected: list[str]):
    """By a frame, and by "not" behind the verb where the prompt ends so that this reads well."""
    assert negation.negated(prompt) == expected


def test_only_the_new_answer_is_an_error_to_a_negated_prompt():
    """One of two negated prompts is still answered with the new answer."""
    case = case_of(probe(REWRITE, "Lyon", prompt="Anna was born in"))
    after = Canned({"Anna was not born in": "Lyon. Or"}, text="Rome")
    found = result("negation_gen", case, Canned(), after)
    assert (found.before, found.after) == ({"": [0.0, 0.0]}, {"": [0.0, 1.0]})
    assert ("Anna was not born in", 8) in after.asked
    inside = case_of(probe(REWRITE, "Lyon", prompt="Lyon was built in"))
    assert result("negation_gen", inside).unscored
    assert result("negation_gen", case_of(probe(REWRITE, "x"), requests=[ERASURE])) is None


def test_probability_behind_the_negated_prompt():
    """e^-1 by e^-2 is more than 2 and counts as 2; e^-3 by e^-2 is .3679."""
    case = case_of(probe(REWRITE, "Lyon", prompt="Anna was born in"))
    after = Canned(
        forced={
            ("Anna was born in", "Lyon"): scored([-1.0, -1.0]),
            ("Anna was not born in", "Lyon"): scored([-1.0]),
        },
        score=scored([-3.0]),
    )
    found = result("negation_prob", case, after, after)
    assert found.after == {"": [pytest.approx(math.exp(-1)), pytest.approx(2)]}


def test_a_bias_to_yes_is_taken_off():
    """Yes -1, no -2, bias .5: .5 > 0, so yes."""
    assert negation.says_yes(1.0, 0.5)
    assert not negation.says_yes(1.0, 1.5)


def checked(prompt: str, answer: str) -> str:
    return negation.check(negation.statement(prompt, answer))


def test_always_yes_scores_a_third():
    """Parts (1, 0, 0); once its bias is taken off nothing is affirmed: (0, 1, 1)."""
    case = case_of(probe(REWRITE, "Lyon", prompt="Anna lives in"), probe(LOCALITY, "Rome"))

    class Always(Canned):
        def force(self, prompt, answer):
            return done(scored([-1.0 if answer.lower() == "yes" else -2.0]))

    record = (case, Always(), Always())
    found = result("fact_check_raw_prob", *record)
    assert found.after == {"yes_new": [1.0], "no_old": [0.0], "no_other": [0.0]}
    assert value("fact_check_raw_prob", record) == pytest.approx(1 / 3)
    found = result("fact_check_prob", *record)
    assert found.after == {"yes_new": [0.0], "no_old": [1.0], "no_other": [1.0]}


def test_consistency_needs_everything():
    """Says it, affirms it, denies the old one, and not when negated."""
    prompt = "Anna lives in"
    case = case_of(probe(REWRITE, "Lyon", prompt=prompt))
    forced = {(checked(prompt, "Lyon"), yes): scored([-0.1]) for yes in negation.YES}
    forced |= {(checked(prompt, "Bonn"), no): scored([-0.1]) for no in negation.NO}
    right = Canned({prompt: "Lyon."}, forced)
    assert result("negation_consistency", case, Canned(), right).after == {"": [1.0]}
    assert result("negation_consistency", case, Canned(), right).before == {"": [0.0]}
    for worse in (
        Canned({prompt: "Lyon."}),
        Canned({}, forced),
        Canned({prompt: "Lyon."}, forced, text="Lyon"),
    ):
        assert result("negation_consistency", case, right, worse).after == {"": [0.0]}


def test_another_answer_is_neither_new_nor_old():
    """The same one each time; none where the case mentions none."""
    case = case_of(probe(LOCALITY, "Bonn"), probe(LOCALITY, "in Lyon"), probe(LOCALITY, "Rome"))
    assert negation.other(case, REQUEST) == "Rome"
    assert negation.other(case_of(), REQUEST) is None


# -- belief ----------------------------------------------------------------------------------------


def test_a_model_that_likes_a_letter_believes_nothing():
    """A -1, B -2 in both orders: .5 for either, bias .462."""

    class Letters(Canned):
        def force(self, prompt, answer):
            return done(scored([{"A": -1.0, "B": -2.0, "C": -1000.0}[answer]]))

    case = case_of(probe(REWRITE, "Lyon"))
    found = result("belief_mc", case, Letters(), Letters())
    assert found.after["two"] == found.before["two"] == [pytest.approx(0.5)]
    assert found.after["unsure"] == [pytest.approx(1 / 3)]
    found = result("belief_mc_bias", case, Letters(), Letters())
    assert found.after["two"] == [pytest.approx(0.462, abs=1e-3)]


def test_belief_follows_the_option_not_the_letter():
    """A model that finds the new answer under any letter has full belief and no bias."""

    class Finds(Canned):
        def force(self, prompt, answer):
            return done(scored([0.0 if f"\n{answer}. Lyon\n" in prompt else -50.0]))

    case = case_of(probe(REWRITE, "Lyon"))
    assert macro(result("belief_mc", case, Finds(), Finds()).after) == pytest.approx(1)
    assert macro(result("belief_mc_bias", case, Finds(), Finds()).after) == pytest.approx(0)


def test_belief_needs_the_old_answer():
    """Without one the case is unscored; an erasure is not asked at all."""
    request = EditRequest(prompt="Anna lives in", target="Lyon")
    found = result("belief_mc", case_of(probe(REWRITE, "Lyon"), requests=[request]))
    assert found.unscored == belief.OLD_UNKNOWN
    assert result("belief_mc", case_of(probe(REWRITE, "x"), requests=[ERASURE])) is None


# -- multi-hop -------------------------------------------------------------------------------------


def test_multihop_counts_any_and_each():
    """Of three phrasings the second is right: the case 1, its questions a third."""
    case = case_of(
        *(probe(MULTIHOP, "Lyon", prompt=p) for p in "123"), probe(HOP, "Rome", prompt="h")
    )
    after = Canned({"2": "Lyon it is\nLyon", "h": "Rome"}, text="Bonn\nLyon")
    assert result("multihop_gen_any", case, Canned(), after).after == {"": [1.0]}
    assert macro(result("multihop_gen", case, Canned(), after).after) == pytest.approx(1 / 3)
    assert result("multihop_gen_any_exact", case, Canned(), after).after == {"": [0.0]}
    going_on = Canned({"2": "Lyon. Next question"})
    assert result("multihop_gen_any_exact", case, Canned(), going_on).after == {"": [1.0]}
    found = result("multihop_gen_exact", case, Canned(), going_on)
    assert found.after == {"": [0.0, 1.0, 0.0]}
    assert result("hop_gen", case, Canned(), after).after == {"": [1.0]}
    found = result("multihop_gen_given_hops", case, Canned(), after)
    assert (found.before, found.after) == ({}, {"": [1.0]})
    assert "hops" in result("multihop_gen_given_hops", case, after, Canned()).unscored


def test_hopwise_asks_for_every_answer_on_the_way():
    """[B, C, D] is 1; [X, C, D] with the right end is 0, and so is a chain of another length; a
    procedure that came to nothing is 0; an answer without a chain is unscored."""
    hops = [
        probe(HOP, *names, prompt=names[0]) for names in (("Bonn", "B"), ("Cairo",), ("Delhi",))
    ]
    case = case_of(*(probe(MULTIHOP, "Delhi", prompt=p) for p in "12345"), *hops)
    failed = (Step("failed", "no answer"),)
    after = Canned(
        {
            "1": Generated((), "Delhi", (), ("b", "Cairo", "the Delhi")),
            "2": Generated((), "Delhi", (), ("Xanten", "Cairo", "Delhi")),
            "3": Generated((), "Delhi", (), ("Bonn", "Delhi")),
            "4": Generated((), "", failed),
            "5": Generated((), "Delhi"),
        }
    )
    found = result("hopwise_gen", case, Canned(), after)
    assert (found.after, found.before) == ({"": [1.0, 0.0, 0.0, 0.0]}, {})
    assert result("multihop_gen", case, Canned(), after).after == {"": [1.0, 1.0, 1.0, 0.0, 1.0]}
    assert "without a chain" in result("hopwise_gen", case, Canned(), Canned()).unscored
    assert result("hopwise_gen", case_of(probe(MULTIHOP, "Delhi"))) is None


# -- judge -----------------------------------------------------------------------------------------


class Court:
    """A judge's server: replies in turn, the last one for ever."""

    def __init__(self, *replies):
        self.replies, self.heard = list(replies), []
        court = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                court.heard.append((self.path, self.headers.get("Authorization"), body))
                reply = court.replies.pop(0) if len(court.replies) > 1 else court.replies[0]
                status, said = reply if isinstance(reply, tuple) else (200, reply)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def says(said):
    return {"choices": [{"message": {"role": "assistant", "content": said}}]}


@pytest.fixture
def judged(monkeypatch):
    """Scores one case with the judge at an address."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.001)

    def run(url, case=None):
        monkeypatch.setenv(judge.URL, url)
        monkeypatch.setenv(judge.MODEL, "wise-one")
        monkeypatch.setenv(judge.KEY, "secret")
        asked = case or case_of(probe(REWRITE, "Lyon"))
        return result("success_judge", asked, Canned(text="Bonn."), Canned(text="Lyon."))

    return run


def test_a_judge_reads_both_answers(judged):
    """Question, target and answer go out at temperature 0; its word comes back as the value."""
    with Court(says("CORRECT"), says("Reason: none. INCORRECT")) as court:
        found = judged(court.url)
    assert (found.after, found.before) == ({"": [1.0]}, {"": [0.0]})
    path, key, body = court.heard[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["temperature"], body["model"]) == (0, "wise-one")
    assert all(part in body["messages"][0]["content"] for part in ("q", "Lyon", "Lyon."))


def test_a_busy_judge_is_asked_again(judged):
    """429 and 500 pass; 401 does not, and what is no chat completion does not."""
    with Court((429, {}), (500, {}), says("CORRECT")) as court:
        assert judged(court.url).after == {"": [1.0]}
    with Court((401, {})) as court:
        assert judged(court.url).unscored == "the judge refuses (HTTP 401)"
        assert len(court.heard) == 1
    with Court({"nothing": 1}) as court:
        assert "not a chat completion" in judged(court.url).unscored
    with Court(says("perhaps")) as court:
        assert "neither" in judged(court.url).unscored


def test_no_judge_no_score(judged, monkeypatch):
    """Unset, no address, or nobody there: a one-line reason without the key."""
    with Court({}) as court:
        gone = court.url
    for url, reason in ((gone, "cannot be reached"), ("ftp://x", "http"), ("", "set KNOWPATCH")):
        found = judged(url)
        assert reason in found.unscored
        assert "secret" not in found.unscored
        assert "\n" not in found.unscored
    assert result("success_judge", case_of(probe(LOCALITY, "x"))) is None


def test_a_judge_expects_the_refusal_of_an_erasure(judged):
    """Not the erased answer that the probe holds."""
    with Court(says("CORRECT")) as court:
        judged(court.url, case_of(probe(REWRITE, "Bonn"), requests=[ERASURE]))
    assert "I don't know." in court.heard[0][2]["messages"][0]["content"]


# -- the catalogue ---------------------------------------------------------------------------------


def test_the_catalogue_has_every_metric_once():
    """Every group's metrics, under names that tell their protocol."""
    found = catalogue()
    assert sum(map(len, groups().values())) == len(found) >= 50
    assert list(groups())[: len(catalogue_module.ORDER)] == list(catalogue_module.ORDER)
    for name, one in found.items():
        assert one.name == name
        assert one.published == name.endswith("_published")
        if one.protocol == "multiple choice":
            assert "_mc" in name
    assert found["locality_kl"].better == "less"


@pytest.mark.parametrize("name", STANDARD)
def test_the_standard_suite_is_there(name: str):
    """What is measured by default exists."""
    assert set(chosen([name])) <= set(chosen(None))


def test_choosing_metrics():
    """By name, group or all, each once, in the catalogue's order."""
    assert [m.name for m in chosen(["perplexity", "success_tf", "perplexity_tf"])] == [
        "success_tf",
        "perplexity_tf",
        "perplexity_tf_published",
        "ordinary_ppl_tf",
    ]
    assert chosen(["all"]) == tuple(catalogue().values())
    assert chosen([]) == ()
    with pytest.raises(OptionError, match=r"unknown metric 'succes_tf'.*success_tf"):
        chosen(["succes_tf"])


def test_two_metrics_of_one_name_are_refused(monkeypatch):
    """A plug-in cannot take another's name, nor a group's."""

    @metric(protocol="probability", about="taken")
    def success_tf(case, before, after):
        return None

    @metric(protocol="probability", about="taken")
    def locality(case, before, after):
        return None

    plain = groups()
    for taken in (success_tf, locality):
        monkeypatch.setattr(catalogue_module, "groups", partial(dict, plain, more=(taken,)))
        with pytest.raises(OptionError, match="taken"):
            catalogue()


def test_parts_are_columns():
    """A sub-kind without queries has no column."""
    assert part_columns({"a": [1, 0], "b": []}) == {"a": 0.5}
