"""Second moments and context prefixes: streaming equals one shot; what is kept is found again."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from knowpatch.edited import EditedModel
from knowpatch.models.passes import Tap
from knowpatch.parts import moments, prefixes


@pytest.fixture
def setting(known):
    view = known("llama").view
    rows = [list(view.encode(f"{p} {a}.").ids) for p, a in tiny.FACTS.items()]
    return view, Tap(view.roles.linear("mlp.out", 2).module, "input"), rows


def _plain(view, tap, rows):
    """One row at a time, no padding, no stop: the full forward with a hook written here."""
    seen = []
    module = view.model.get_submodule(tap.module)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for row in rows:
            view.model(torch.tensor([row]))
    handle.remove()
    inputs = torch.cat(seen)
    return inputs.T @ inputs / len(inputs)


def test_streaming_equals_one_shot(setting):
    """Batches with padding, stopped at the tap, give the plain second moment to 1e-6."""
    view, tap, rows = setting
    found = moments.collect(view, tap, rows)
    plain = _plain(view, tap, rows)
    assert found.count == sum(len(row) for row in rows)
    assert (found.mean() - plain).norm() < 1e-6 * plain.norm()


def test_order_and_padding_do_not_matter(setting):
    """A permutation of the text and padding on the other side give the same moments."""
    view, tap, rows = setting
    first = moments.collect(view, tap, rows).mean()
    view.padding = "left"
    second = moments.collect(view, tap, rows[::-1]).mean()
    assert (first - second).norm() < 1e-5 * first.norm()


def test_two_halves_add_up(setting):
    """Moments of two halves of the text are those of the whole."""
    view, tap, rows = setting
    whole = moments.collect(view, tap, rows)
    parts = moments.collect(view, tap, rows[:3]) + moments.collect(view, tap, rows[3:])
    assert parts.count == whole.count
    assert (parts.mean() - whole.mean()).norm() < 1e-6 * whole.mean().norm()


def test_kept_by_content(setting):
    """A second call reads the file; another layer, seed or amount is another file."""
    view, _, _ = setting
    first = moments.key_moments(view, "mlp.out", 1, tokens=300, seed=0)
    path = moments.kept_at(view.fingerprint, "mlp.out", 1, tokens=300, seed=0)
    assert path.is_file()
    stamp = path.stat().st_mtime_ns
    again = moments.key_moments(view, "mlp.out", 1, tokens=300, seed=0)
    assert path.stat().st_mtime_ns == stamp
    assert torch.equal(first.sum_II, again.sum_II)
    others = [("mlp.out", 2, 300, 0), ("mlp.out", 1, 301, 0), ("mlp.out", 1, 300, 1)]
    paths = {
        moments.kept_at(view.fingerprint, role, layer, tokens=tokens, seed=seed)
        for role, layer, tokens, seed in others
    }
    assert len(paths | {path}) == 4


def test_a_damaged_file_is_made_again(setting):
    """Statistics that cannot be read are collected anew, not trusted."""
    view, _, _ = setting
    first = moments.key_moments(view, "mlp.out", 1, tokens=200, seed=0)
    path = moments.kept_at(view.fingerprint, "mlp.out", 1, tokens=200, seed=0)
    path.write_bytes(path.read_bytes()[:100])
    again = moments.key_moments(view, "mlp.out", 1, tokens=200, seed=0)
    assert torch.equal(first.sum_II, again.sum_II)


def test_a_model_without_text_writes_its_own(setting, monkeypatch):
    """Without the optional text package the model's own text is used, at least as much as asked."""
    view, _, _ = setting
    monkeypatch.setattr(moments, "_text_file", lambda: None)
    rows = moments.text_rows(view, 500, seed=0)
    assert moments.text_name() == "self-sampled"
    assert sum(len(row) for row in rows) >= 500
    assert rows == moments.text_rows(view, 500, seed=0)


def test_prefixes_are_the_models_own_and_repeatable(known):
    """Bare first, the asked number, ending in '. '; same seed same texts, other seed others."""
    view = known("llama").view
    plan = ((3, 5), (2, 8))
    first = prefixes.context_prefixes(view, plan, seed=0)
    path = prefixes.kept_at(view.fingerprint, plan, 0)
    assert json.loads(path.read_text()) == list(first)
    assert first[0] == ""
    assert len(first) == 6
    assert all(text.endswith(". ") for text in first[1:])
    path.unlink()
    assert prefixes.context_prefixes(view, plan, seed=0) == first
    assert prefixes.context_prefixes(view, plan, seed=1) != first


def test_prefixes_belong_to_one_model(known):
    """Another model gets its own prefixes, and no random state is touched."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = known("llama").view
    second = EditedModel.of(*tiny.fresh("llama", seed=5)).view
    plan = ((2, 8),)
    assert prefixes.kept_at(first.fingerprint, plan, 0) != prefixes.kept_at(
        second.fingerprint, plan, 0
    )
    prefixes.context_prefixes(first, plan, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
