"""Every metric of the catalogue on a tiny model that knows facts, over cases of every kind."""

from __future__ import annotations

import math

import pytest
import tiny

from knowpatch import edit
from knowpatch.ask import Ask
from knowpatch.data.case import (
    FORGET,
    GENERAL,
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
from knowpatch.metrics.asker import Asker, Nobody
from knowpatch.metrics.catalogue import catalogue
from knowpatch.metrics.metric import macro
from knowpatch.request import EditRequest

FRANCE = EditRequest(
    prompt="The capital of France is", target="Rome", subject="France", old="Paris"
)
JAPAN = EditRequest(prompt="The capital of Japan is", kind="erase", subject="Japan", old="Tokyo")
KNOWN = "The capital of Italy is"

FACT = Case(
    "fact",
    (FRANCE,),
    (
        Probe(REWRITE, FRANCE.prompt, accepted("Rome"), request=0),
        Probe(REPHRASE, "London. The capital of France is", accepted("Rome"), request=0),
        Probe(f"{PORTABILITY}.Reasoning", "Two plus two equals", accepted("four", "4")),
        Probe(f"{LOCALITY}.Relation", KNOWN, accepted("Rome", "Roma")),
        Probe(NEIGHBOUR, "The capital of Egypt is", accepted("Cairo")),
        Probe(f"{LOCALITY}.open", "The colour of the sky is"),
        Probe(MULTIHOP, KNOWN, accepted("Rome")),
        Probe(MULTIHOP, "The Nile flows through", accepted("Sudan")),
        Probe(HOP, "The Nile flows through", accepted("Egypt")),
        Probe(GENERAL, KNOWN, accepted("Rome"), choices=("Rome", "Paris", "four")),
    ),
)
OPINION = Case(
    "opinion",
    (EditRequest(prompt="The sky is", target="blue, it is well known"),),
    (
        Probe(REWRITE, "The sky is", accepted("blue, it is well known")),
        Probe(SAME, "The sky is", accepted("blue, it is well known", "blue five")),
        Probe(OPPOSITE, "The sky is", accepted("green, it is well known")),
        Probe(OTHER, "The Nile is", accepted("green because you know", "five")),
    ),
)
ERASURE = Case(
    "erasure",
    (JAPAN,),
    (
        Probe(REWRITE, JAPAN.prompt, accepted(JAPAN.target), request=0),
        Probe(FORGET, JAPAN.prompt, accepted("Tokyo")),
        Probe(RETAIN, KNOWN, accepted("Rome")),
        Probe(RETAIN, "Two plus two equals", accepted("four")),
    ),
)
BARE = Case("bare", (FRANCE,), ())
CASES = (FACT, OPINION, ERASURE)
LEAST = {"prob_magnitude": -1.0, "prob_rephrase_magnitude": -1.0}
LEAST["prob_neighbourhood_magnitude"] = -1.0
COMPARISONS = ("locality_tf", "locality_right_tf", "locality_gen_same", "locality_gen_right")
COMPARISONS += ("retain_right_gen", "retain_same_gen", "retain_gen_published", "general_same_mc")


@pytest.fixture(autouse=True)
def no_judge(monkeypatch):
    """No test asks a judge that the user has."""
    monkeypatch.delenv("KNOWPATCH_JUDGE_URL", raising=False)


def scores(model, patches=(), cases=CASES, *, chat=False):
    """Metric and case to its score, asked as the runner asks: before first, then after."""
    before = [Asker(Ask(model), (), chat) for _ in cases]
    for case, asker in zip(cases, before, strict=True):
        for metric in catalogue().values():
            metric.ask(case, asker, Nobody(asker.ask, (), chat))
        asker.ask.run()
    ask, results = Ask(model), {}
    for case, asker in zip(cases, before, strict=True):
        after = Asker(ask, patches, chat)
        for name, metric in catalogue().items():
            results[name, case.id] = metric.ask(case, asker.answered(), after)
    ask.run()
    return {key: result() for key, result in results.items() if result is not None}


@pytest.fixture(scope="module")
def found():
    """The model held against itself, and against itself with a fact told and one erased."""
    from knowpatch.edited import EditedModel

    model = EditedModel.of(*tiny.trained("llama", chat=True))
    patches = [edit(model, FRANCE, method="ice"), edit(model, JAPAN, method="ice")]
    return scores(model), scores(model, patches)


@pytest.mark.parametrize("name", catalogue())
def test_every_metric_gives_values_in_range(name: str, found):
    """Each applies to a case here; its values are finite, and shares are shares."""
    metric = catalogue()[name]
    every = [score for run in found for (other, _), score in run.items() if other == name]
    # Nobody judges here, and a plain model gives no chain of answers.
    assert name in ("success_judge", "hopwise_gen") or any(score.after for score in every)
    for run in found:
        mine = {case: score for (other, case), score in run.items() if other == name}
        assert mine
        for score in mine.values():
            assert (score.unscored is None) == bool(score.after)
            for values in (score.after, score.before or {}):
                flat = [value for queries in values.values() for value in queries]
                assert all(math.isfinite(value) for value in flat)
                if metric.percent:
                    assert all(LEAST.get(name, 0) <= value <= 1 for value in flat)
                columns = metric.columns(values)
                combined = metric.combine(columns) if columns else None
                assert combined is None or math.isfinite(combined)


@pytest.mark.parametrize("name", catalogue())
def test_a_model_held_against_itself_gains_nothing(name: str, found):
    """Before equals after; comparisons are full, divergences 0."""
    for (other, _), score in found[0].items():
        if other != name or not score.after:
            continue
        if score.before is not None and score.before:
            assert score.after.keys() == score.before.keys()
            for sub, queries in score.after.items():
                assert queries == pytest.approx(score.before[sub], rel=1e-4, abs=1e-6)
        if name in COMPARISONS:
            assert macro(score.after) == 1
        if name.endswith("_kl"):
            assert macro(score.after) == pytest.approx(0, abs=1e-6)


def test_what_the_model_knows_is_seen(found):
    """It says Paris before and Rome after the edit, and keeps the capital of Italy."""
    before = found[0]["success_gen_contains", "fact"]
    after = found[1]["success_gen_contains", "fact"]
    assert (before.after, after.before) == ({"": [0.0]}, {"": [0.0]})
    assert after.after == {"": [1.0]}
    assert found[0]["leak_gen", "erasure"].after == {"": [1.0]}
    assert found[0]["prob_success", "fact"].after == {"": [0.0]}
    assert found[1]["prob_success", "fact"].after == {"": [1.0]}
    assert found[0]["multihop_gen_any", "fact"].after == {"": [1.0]}
    assert found[0]["multihop_gen", "fact"].after == {"": [1.0, 0.0]}
    assert found[0]["locality_gen_right", "fact"].after == {"Relation": [1.0], "neighbour": [1.0]}
    assert found[1]["locality_kl", "fact"].after["Relation"][0] > 0


def test_metrics_apply_where_their_probes_are(found):
    """A case without a kind of probe does not count, and one without any counts nowhere."""
    names = {case: {n for n, other in found[0] if other == case} for case in ("fact", "erasure")}
    assert {"locality_tf", "hop_gen", "prob_score", "belief_mc"} <= names["fact"]
    assert not {"refusal_gen", "sentiment_prob"} & names["fact"]
    assert {"refusal_gen", "retain_same_gen", "success_gen_exact"} <= names["erasure"]
    assert not {"locality_tf", "negation_gen", "belief_mc", "hop_gen"} & names["erasure"]


def test_nothing_applies_to_a_case_without_probes(known):
    """No questions, no scores."""
    assert scores(known("llama"), cases=[BARE]) == {}


def test_questions_go_through_the_chat_template(known):
    """Every metric that applies also runs in a chat."""
    run = scores(known("llama", chat=True), cases=[ERASURE], chat=True)
    assert run["refusal_gen", "erasure"].after


@pytest.mark.parametrize("architecture", ["gpt2"])
def test_other_decoders_and_tokenizers(known, architecture: str):
    """Another decoder with another tokenizer gives the same kinds of values."""
    run = scores(known(architecture, "sentencepiece"), cases=[FACT])
    assert run["success_gen_contains", "fact"].before == {"": [0.0]}
    assert run["locality_tf", "fact"].after["Relation"] == [1.0]
