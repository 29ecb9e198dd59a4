"""The teacher-forced metrics against a plain loop: the same number for every record.

The metrics ask in batches, with shared beginnings and with patches beside the model; the loop in
plain/loop.py asks a transformers model one question at a time, whose weights were changed by hand.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from made import provenance

from knowpatch.ask import Ask
from knowpatch.data.source import load
from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.editing import edit
from knowpatch.metrics.asker import Asker
from knowpatch.metrics.kinds.accuracy import portability_tf, success_tf
from knowpatch.metrics.kinds.locality import locality_tf
from knowpatch.metrics.metric import macro
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch

LOOP = Path(__file__).parents[1] / "plain" / "loop.py"
FILES = {"wiki_counterfact": "wiki_counterfact/test_cf.json", "zsre": "ZsRE/ZsRE-test-all.json"}
METRICS = {"success": success_tf, "portability": portability_tf, "locality": locality_tf}
COUNT = 50
QUERIES, ALIASES = 1, 2
"""So many of each record's questions (of each sub-kind) and aliases: the loop is slow."""
WHOLE = 8
"""Records with both groups of questions; those behind them take turns."""

every_set = pytest.mark.parametrize("name", FILES)


def _module(path):
    """A module by its path: benchmarks/ has a package called plain, too."""
    spec = importlib.util.spec_from_file_location(f"plain_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loop = _module(LOOP)


@pytest.fixture(scope="module")
def plain(model):
    """The bundled model as transformers loads it."""
    folder = model.view.identity.folder
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def loaded(records, tmp_path):
    """(raw records, the cases that knowpatch makes of them), cut to a size for the loop."""

    def both(name, count):
        kept = [_cut(*numbered) for numbered in enumerate(records(FILES[name])[:count])]
        path = tmp_path / "KnowEdit" / "benchmark" / FILES[name]
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(kept), encoding="utf-8")
        return kept, load(name, split="test", data=tmp_path).cases

    return both


def _cut(number, record):
    def few(truth):
        if isinstance(truth, str):
            return truth
        return [answer if isinstance(answer, str) else answer[:ALIASES] for answer in truth[:1]]

    cut = dict(record)
    for turn, group in enumerate(("portability", "locality")):
        asked = number < WHOLE or number % 2 == turn
        cut[group] = {
            kind: [{**item, "ground_truth": few(item["ground_truth"])} for item in items[:QUERIES]]
            for kind, items in record[group].items()
            if asked
        }
    return cut


def _changed(plain, patch):
    """The plain model with a patch's changes added to its weights by hand."""
    edited = copy.deepcopy(plain)
    for delta in patch.deltas:
        change = delta.change.tensors()
        whole = change["left"] @ change["right"] if "left" in change else change["delta"]
        with torch.no_grad():
            edited.get_parameter(delta.address.parameter).add_(whole)
    return edited


def _logits(model):
    return lambda ids: model(input_ids=ids).logits


def _measured(model, cases, patches):
    """What the metrics say of each case, all asked before anything is answered."""
    ask = Ask(model)
    before = Asker(Ask(model), ())
    asked = []
    for case, patch in zip(cases, patches, strict=True):
        after = Asker(ask, (patch,))
        asked.append({name: m.ask(case, before, after) for name, m in METRICS.items()})
    return [
        {name: None if result is None else macro(result().after) for name, result in one.items()}
        for one in asked
    ]


def _by_loop(plain, tokenizer, records, patches):
    edited = {patch: _changed(plain, patch) for patch in dict.fromkeys(patches)}
    return [
        loop.score(record, _logits(plain), _logits(edited[patch]), tokenizer)
        for record, patch in zip(records, patches, strict=True)
    ]


def _compare(model, plain, records, cases, patches):
    ours = _measured(model, cases, patches)
    theirs = _by_loop(plain, model.tokenizer, records, patches)
    for case, one, other in zip(cases, ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-6), case.id
    return {name: [one[name] for one in ours if one[name] is not None] for name in METRICS}


@every_set
def test_metrics_equal_a_plain_loop(name, model, plain, loaded):
    """Fifty records, the model disturbed at random: each score to 1e-6."""
    records, cases = loaded(name, COUNT)
    role = model.view.roles.linear("mlp.out", 12)
    rows, columns = model.view.values(role.address.parameter).shape
    noise = torch.Generator().manual_seed(0)
    left = torch.randn(rows, 4, generator=noise)
    right = torch.randn(4, columns, generator=noise)
    change = LowRank(left * 0.15, right * 0.15)
    made_by = provenance(model, cases[0].requests[0])
    patch = Patch(made_by, deltas=(WeightDelta(role.address, change),))
    found = _compare(model, plain, records, cases, [patch] * len(cases))
    print(name, {key: (len(some), sum(some) / len(some)) for key, some in found.items()})
    for scores in found.values():
        assert len(scores) > COUNT / 3
        assert 0.05 < sum(scores) / len(scores) < 0.95  # neither all right nor all wrong


def test_metrics_equal_a_plain_loop_on_real_edits(model, plain, loaded):
    """Three records, each edited by fine-tuning."""
    records, cases = loaded("wiki_counterfact", 3)
    options = {"steps": 6, "learning_rate": 5e-3}
    patches = [edit(model, case.requests, method="ft", options=options) for case in cases]
    found = _compare(model, plain, records, cases, patches)
    assert sum(found["success"]) > 1.5


@every_set
def test_joining_by_ids_equals_joining_the_text(name, model, records):
    """Prompt and answer as one text give the tokens that knowpatch puts one behind the other,
    but before an answer in a script without spaces, where it puts none."""
    unlike = set()
    for record in records(FILES[name])[:COUNT]:
        for prompt, answer in _questions(record):
            ids, places = loop.tokens(model.tokenizer, prompt, answer)
            encoded = model.encode(prompt)
            target = continuation(model.tokenizer, encoded, answer.strip())
            if (tuple(ids), len(places)) != ((*encoded.ids, *target), len(target)):
                unlike.add(answer)
    assert unlike == ({"ゲイ"} if name == "wiki_counterfact" else set())


def _questions(record):
    yield record["prompt"], record["target_new"]
    for group in ("portability", "locality"):
        for items in record[group].values():
            for item in items:
                answers = loop.aliases(item["ground_truth"])
                yield from ((item["prompt"], answer) for answer in answers if answer.strip())
