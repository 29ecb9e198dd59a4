"""The plain MEMIT and AlphaEdit of the benchmarks do what their cards say, and what ours solves."""

from __future__ import annotations

import hashlib

import pytest
import torch
from plain import alphaedit, memit, rome

from knowpatch.parts.solve import Form, update
from knowpatch.parts.space import Space
from knowpatch.parts.spans import continuation, subject_position

BLOCK = "model.layers.2"
MAPS = ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
ASKED = (
    ("The capital of France is", "France", "Lyon"),
    ("The capital of Egypt is", "Egypt", "Rome"),
)
PREFIXES = ("", "You know. ", "The river. ")
VALUE = rome.Settings(8, 0.2, 4.0, 0.5, 0.0625, 0.0)


def _fact(view, prompt, subject, target):
    rows = []
    for prefix in PREFIXES:
        encoded = view.encode(prompt, before=prefix)
        ids = continuation(view.tokenizer, encoded, target)
        rows.append(((*encoded.ids, *ids[:-1]), subject_position(encoded, subject)))
    kl = view.encode(f"{subject} is a")
    return rome.Fact(tuple(ids), tuple(rows), (kl.ids, subject_position(kl, subject)))


@pytest.fixture
def case(known):
    model = known("llama")
    return model.model, [_fact(model.view, *asked) for asked in ASKED]


def _second(width: int, *, seed: int = 0) -> torch.Tensor:
    """A second moment of synthetic keys (I, I), float64; a third of it has next to no energy."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(rows[:width]).Q
    scale = torch.ones(width, dtype=torch.float64)
    scale[: width // 3] = 0.02
    keys = rows[width:] * scale @ rotation
    return keys.T @ keys / len(keys)


def _problem(width: int = 96, out: int = 24, count: int = 3):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(width, count, generator=generator, dtype=torch.float64)
    return keys, torch.randn(out, count, generator=generator, dtype=torch.float64)


def _digest(model) -> str:
    state = model.state_dict()
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].numpy().tobytes())
    return found.hexdigest()


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_no_delta_reproduces_the_clean_logits(case):
    """A zero added to the residual stream changes no bit; without steps the target is the state."""
    model, facts = case
    given = rome.inputs(facts[0].contexts)
    positions = [position for _, position in facts[0].contexts]
    with torch.no_grad():
        clean = model(**given).logits
        with rome.shifted(model, BLOCK, positions, torch.zeros(48)):
            assert torch.equal(model(**given).logits, clean)
    still = rome.Settings(steps=1)
    states_DN = memit.states(model, BLOCK, facts)
    assert torch.allclose(memit.targets(model, BLOCK, facts, still), states_DN, atol=1e-5)


def _logprob(model, fact, delta_D) -> float:
    """Log-probability of the target behind the bare prompt, with delta added to the block."""
    ids, position = fact.contexts[0]
    with torch.no_grad(), rome.shifted(model, BLOCK, [position], delta_D):
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    count = len(fact.target)
    return float(logprobs_TV[-count:][range(count), list(fact.target)].sum())


def test_targets_make_their_facts_likely_and_stay_in_the_ball(case):
    """With z put in for the state, each target gets likelier; |z - h| <= clamp |h|."""
    model, facts = case
    states_DN = memit.states(model, BLOCK, facts)
    deltas_DN = memit.targets(model, BLOCK, facts, VALUE) - states_DN
    sizes_N = states_DN.norm(dim=0)
    assert bool((deltas_DN.norm(dim=0) <= VALUE.clamp * sizes_N * (1 + 1e-5)).all())
    for fact, delta_D in zip(facts, deltas_DN.T, strict=True):
        gained = _logprob(model, fact, delta_D) - _logprob(model, fact, torch.zeros(48))
        assert gained > 0.3


def test_a_block_that_puts_out_a_tuple(case):
    """Blocks of older transformers put out tuples: the same target, to 1e-6."""
    model, facts = case
    bare = memit.targets(model, BLOCK, facts[:1], VALUE)

    class Older(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return (self.inner(*args, **kwargs),)

    class First(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = Older(inner)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner.inner, name)

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)[0]

    model.model.layers[2] = First(model.model.layers[2])
    as_tuple = memit.targets(model, f"{BLOCK}.inner", facts[:1], VALUE)
    assert _far(as_tuple, bare) < 1e-6


def _entering(model, path, ids, position) -> torch.Tensor:
    seen = []
    hook = rome.hooked(model, path, lambda mod, args, output: seen.append(args[0][0, position]))
    with hook, torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return seen[0]


def test_keys_are_half_bare_and_half_behind_prefixes(case):
    """k = k_bare / 2 + mean of the prefixed / 2, each from a pass of its own without padding."""
    model, facts = case
    found_IN = memit.keys(model, MAPS[0], facts)
    for number, fact in enumerate(facts):
        seen = [_entering(model, MAPS[0], ids, position) for ids, position in fact.contexts]
        expected_I = seen[0] / 2 + torch.stack(seen[1:]).mean(0) / 2
        assert torch.allclose(found_IN[:, number], expected_I, atol=1e-5)


def test_with_next_to_no_lambda_one_layer_writes_the_whole_residual(case):
    """lambda -> 0, one fact, one layer: the map gives z - h more at the averaged key, to 1e-4."""
    model, facts = case
    key_I = memit.keys(model, MAPS[1], facts[:1])[:, 0]
    wanted_D = memit.targets(model, BLOCK, facts[:1], VALUE) - memit.states(model, BLOCK, facts[:1])
    settings = memit.Settings(1e-9, VALUE)
    (delta_DI,) = memit.edit(model, BLOCK, MAPS[1:], facts[:1], [_second(96)], settings)
    assert _far(delta_DI @ key_I.double(), wanted_D[:, 0]) < 1e-4


def test_two_layers_close_the_gap_and_share_it(case):
    """The first of two layers closes about half of the gap, the second what is left of it."""
    model, facts = case
    targets_DN = memit.targets(model, BLOCK, facts, VALUE)
    left = [float((targets_DN - memit.states(model, BLOCK, facts)).norm())]

    def change(layer, keys_IN, residuals_DN):
        left.append(float(residuals_DN.norm()) * (len(MAPS) - layer))
        return memit.closed_form(keys_IN, residuals_DN, _second(96), 1e-6)

    with memit.restored(model, MAPS):
        memit.spread(model, BLOCK, MAPS, facts, targets_DN, change)
        after = float((targets_DN - memit.states(model, BLOCK, facts)).norm())
    assert left[1] == pytest.approx(left[0], rel=1e-4)
    assert after < left[2] < left[0]


def test_the_model_is_given_back_as_it_was(case):
    """The same bytes in every weight, after both methods and after a failure; no hook is left."""
    model, facts = case
    before, seconds = _digest(model), [_second(96), _second(96, seed=3)]
    memit.edit(model, BLOCK, MAPS, facts, seconds, memit.Settings(10.0, VALUE))
    projectors = [alphaedit.projector(second) for second in seconds]
    alphaedit.edit(model, BLOCK, MAPS, facts, projectors, alphaedit.Settings(1.0, VALUE))
    with pytest.raises(IndexError):
        memit.edit(model, BLOCK, MAPS, facts, seconds[:1], memit.Settings(10.0, VALUE))
    assert _digest(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_memits_solve_is_ours():
    """The dense solve in float64 is the update of a form with slack 1, to 1e-6."""
    second_II, (keys_IN, residuals_DN) = _second(96), _problem()
    plain_DI = memit.closed_form(keys_IN, residuals_DN, second_II, 30.0)
    left, right = update(residuals_DN, keys_IN, Form.of(30.0 * second_II), slack=1.0)
    assert _far(left @ right, plain_DI) < 1e-6
    # Self-check 9 of the card: what is missing at the keys is -R (I + K' C^-1 K / lambda)^-1.
    inner_NN = torch.eye(3) + keys_IN.T @ torch.linalg.inv(second_II) @ keys_IN / 30.0
    missing_DN = plain_DI @ keys_IN - residuals_DN
    assert _far(missing_DN, -residuals_DN @ torch.linalg.inv(inner_NN)) < 1e-9


def test_alphaedits_solve_is_ours():
    """The dense solve in float32 is the update in the reduced space, to 1e-4; in float64, 1e-10."""
    second_II, (keys_IN, residuals_DN) = _second(96), _problem()
    values_I, vectors_II = torch.linalg.eigh(second_II)
    space = Space.below(values_I, vectors_II, 2e-2)
    assert space.width == 32
    projector_II = alphaedit.projector(second_II)
    assert _far(projector_II, space.basis_IJ @ space.basis_IJ.T) < 1e-4
    earlier_IM = _problem(count=5)[0].flip(0)
    form = Form.even(0.5, space.coordinates).keeping(space.inside(earlier_IM))
    left, right = update(
        residuals_DN, space.inside(keys_IN), form, slack=1.0, basis_IJ=space.basis_IJ
    )
    ours_DI, earlier_II = left @ right, earlier_IM @ earlier_IM.T
    plain_DI = alphaedit.closed_form(keys_IN, residuals_DN, projector_II, earlier_II.float(), 0.5)
    assert plain_DI.dtype == torch.float32
    assert _far(plain_DI, ours_DI) < 1e-4
    exact_II = space.basis_IJ @ space.basis_IJ.T
    assert (
        _far(alphaedit.closed_form(keys_IN, residuals_DN, exact_II, earlier_II, 0.5), ours_DI)
        < 1e-10
    )


def test_alphaedit_keeps_keys_and_leaves_ordinary_ones_alone(case):
    """Changes read nothing above the threshold; afterwards Cp has grown by the edited keys."""
    model, facts = case
    seconds = [_second(96), _second(96, seed=3)]
    projectors = [alphaedit.projector(second) for second in seconds]
    settings = alphaedit.Settings(0.1, VALUE)
    changes, kept = alphaedit.edit(model, BLOCK, MAPS, facts, projectors, settings)
    for change_DI, projector_II in zip(changes, projectors, strict=True):
        assert _far(change_DI @ projector_II, change_DI) < 1e-4
    with memit.restored(model, MAPS), torch.no_grad():
        for path, change_DI in zip(MAPS, changes, strict=True):
            memit.weight(model, path).add_(change_DI)
        for path, kept_II in zip(MAPS, kept, strict=True):
            keys_IN = memit.keys(model, path, facts)
            assert _far(kept_II, keys_IN @ keys_IN.T) < 1e-5
    _, more = alphaedit.edit(model, BLOCK, MAPS, facts, projectors, settings, kept)
    assert float(more[0].trace()) > float(kept[0].trace())
