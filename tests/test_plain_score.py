"""The plain side of benchmarks/ask.py: right by hand, and the same numbers as the metrics."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from made import provenance
from plain.score import PlainScorer, divergence, macro, same

from knowpatch.bench.scoring import Asked, Scorer
from knowpatch.data.case import Case, Probe, accepted
from knowpatch.deltas import LowRank, WeightDelta
from knowpatch.metrics.catalogue import chosen
from knowpatch.metrics.metric import macro as macro_of
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

PROMPT = "The capital of France is"
METRICS = ("success_tf", "success_exact", "portability_tf", "locality_tf", "locality_kl")


def test_by_hand():
    """Equal places by equal places; KL of (.7, .3) from (.6, .4); means of means."""
    old, new = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert same(old, new) == 0.5
    p, q = torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.6, 0.4]]).log()
    assert divergence(p, q) == pytest.approx(0.7 * math.log(7 / 6) + 0.3 * math.log(0.75))
    assert macro([[1.0, 0.0, None], [1.0], []]) == 0.75
    assert macro([[None]]) is None


def test_equal_to_the_metrics(known):
    """A rank-one patch, each metric asked its own way: the same numbers."""
    model = known("llama")
    others = [prompt for prompt in tiny.FACTS if prompt != PROMPT]
    probes = [Probe("rewrite", PROMPT, accepted("New London"), request=0)]
    probes += [Probe("portability.One", others[0], (("Tokyo", "Two Rome"), ("Madrid",)))]
    probes += [Probe("locality.Other", p, accepted(tiny.FACTS[p])) for p in others[1:4]]
    request = EditRequest(prompt=PROMPT, target="New London")
    case = Case("1", (request,), tuple(probes))
    role = model.view.roles.linear("mlp.out", 1)
    out, into = model.view.weight(role).shape
    generator = torch.Generator().manual_seed(0)
    change = LowRank(
        torch.randn(out, 1, generator=generator), torch.randn(1, into, generator=generator) / 4
    )
    patch = Patch(provenance(model, request), (WeightDelta(role.address, change),))
    scorer = Scorer(model, chosen(METRICS), chat=False)
    (before,) = scorer.before([case])
    (ours,) = scorer.after([Asked(case, before, (patch,))])
    plain = PlainScorer(model.tokenizer)

    def forward(ids):
        return model.model(input_ids=ids).logits

    def rows():
        return [plain.forced(forward, p.prompt, p.answers[0][0])[1] for p in probes[2:]]

    def right(probe, *, exact=False):
        return plain.accuracy(forward, probe.prompt, probe.aliases, exact=exact)

    old = rows()
    with model.applied(patch):
        found = {
            "success_tf": right(probes[0]),
            "success_exact": right(probes[0], exact=True),
            "portability_tf": right(probes[1]),
            "locality_tf": macro([[same(a, b) for a, b in zip(old, rows(), strict=True)]]),
            "locality_kl": macro([[divergence(a, b) for a, b in zip(old, rows(), strict=True)]]),
        }
    for name, value in found.items():
        # KL is a lower bound by design, over the likeliest tokens and the rest.
        slack = 0.05 * value if name == "locality_kl" else 1e-6
        assert macro_of(ours[name].after) == pytest.approx(value, abs=slack), name
