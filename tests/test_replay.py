"""Replayed passes, against the full pass: their logits, their gradients, and what they leave."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import edit
from knowpatch.errors import RequestError
from knowpatch.models import replay
from knowpatch.models.batch import Batch
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.models.passes import Row
from knowpatch.models.past import Past, shared_beginnings
from knowpatch.models.replay import Replay, Whole, passes, renumbered
from knowpatch.models.twin import twin
from knowpatch.parts.spans import continuation, subject_position
from knowpatch.parts.tasks import ValueTask
from knowpatch.parts.values import ValueSettings, optimise
from knowpatch.request import EditRequest

LABELS = 7
"""Losses read the log-probability of this many tokens at each wanted place."""


@pytest.fixture(scope="module")
def view_of():
    """The view of a trained model of an architecture, made once; for tests that only read it."""
    kept = {}

    def get(architecture):
        if architecture not in kept:
            kept[architecture] = EditedModel.of(*tiny.trained(architecture)).view
        return kept[architecture]

    return get


def _ids(view, count, seed):
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(view.vocabulary, (count,), generator=made).tolist())


def _case(view):
    """Rows of many lengths and positions, with shared beginnings; and one to three places each."""
    shared = _ids(view, 7, 0)
    rows = [
        Row((*shared, *_ids(view, 3, 1)), 8),
        Row((*shared[:4], *_ids(view, 8, 2)), 5),
        Row(_ids(view, 6, 3), 0),
        Row((*shared, *_ids(view, 1, 4)), 7),
        Row(_ids(view, 12, 5), 11),
        Row((*shared[:4], *_ids(view, 5, 6)), 0),
        Row(_ids(view, 1, 7), 0),
    ]
    places = [(0, 8), (0, 9), (1, 5), (1, 7), (1, 11), (2, 0), (2, 3), (2, 5)]
    return rows, [*places, (3, 7), (4, 11), (5, 4), (6, 0)]


def _shift(view, rows, seed=8):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), 1, view.roles.hidden_size, generator=made)


def _module(view, layer):
    return view.roles.linear("mlp.out", layer).module


def _probe(way, shift_BSD):
    """Logits, and the gradient of a loss with respect to the shift."""
    leaf = shift_BSD.clone().requires_grad_()
    logits = way.run(leaf).logits_MV
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[:, :LABELS].sum(), leaf)
    return logits.detach(), grad[:, 0]


def _apart(one, other):
    """The largest relative difference of a row."""
    return float(((one - other).norm(dim=1) / one.norm(dim=1).clamp(min=1e-12)).max())


def _agree(way, whole, shift_BSD, bound=1e-4):
    for plain, fast in zip(_probe(whole, shift_BSD), _probe(way, shift_BSD), strict=True):
        assert _apart(plain, fast) < bound


def _delta(view, role, layer, seed, size=0.3):
    """A low-rank change of a linear map, large enough to be seen."""
    name = view.roles.linear(role, layer).address.parameter
    out, into = view.parameter(name).shape
    made = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, 1, generator=made), torch.randn(1, into, generator=made)
    return WeightDelta(Address(parameter=name), LowRank(size * left, right), "")


def _state(model):
    """Everything that a pass must leave as it found it."""
    return {
        "weights": {n: tensor_digest(p) for n, p in model.named_parameters()},
        "buffers": {n: tensor_digest(b) for n, b in model.named_buffers()},
        "grad": {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "parts": {n: id(m) for n, m in model.named_modules()},
        "attention": model.config._attn_implementation,
        "random": torch.get_rng_state().tolist(),
    }


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_replay_equals_the_full_pass(view_of, architecture, layer):
    """Logits and gradients of every row are those of the full pass, to 1e-4."""
    view = view_of(architecture)
    module = _module(view, layer % len(view.roles.blocks))
    rows, places = _case(view)
    way = passes(view, [module], rows, places)
    assert isinstance(way, Replay)
    whole = Whole(view, [module], rows, places)
    for seed in (8, 9):
        _agree(way, whole, _shift(view, rows, seed))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_kept_rows_go_on_as_if_they_were_all(view_of, architecture, layer):
    """After rows are dropped, twice, the rest equals new passes over the rest alone."""
    view = view_of(architecture)
    module = _module(view, layer)
    rows, places = _case(view)
    way = passes(view, [module], rows, places)
    shift_BSD = _shift(view, rows)
    way.run(shift_BSD)
    for kept in ([0, 1, 2, 4, 5], [1, 2, 4]):
        way.keep(kept)
        places = renumbered(places, kept)
        rows, shift_BSD = [rows[i] for i in kept], shift_BSD[kept]
        _agree(way, Whole(view, [module], rows, places), shift_BSD)
        _agree(way, passes(view, [module], rows, places), shift_BSD)


def test_the_full_pass_keeps_rows_alike(view_of):
    """What is left of a full pass is the full pass over the rest."""
    view = view_of("llama")
    rows, places = _case(view)
    kept = [0, 1, 4]
    whole = Whole(view, [_module(view, 1)], rows, places)
    whole.keep(kept)
    rest = Whole(view, [_module(view, 1)], [rows[i] for i in kept], renumbered(places, kept))
    _agree(whole, rest, _shift(view, kept))


def test_bfloat16_points_the_same_way(view_of):
    """Replayed in bfloat16, every row's gradient has a cosine above 0.99 with float32's."""
    view = view_of("llama")
    rows, places = _case(view)
    for layer in (0, 2):
        ways = [
            passes(view, [_module(view, layer)], rows, places, dtype=dtype)
            for dtype in (None, torch.bfloat16)
        ]
        (logits, wide), (coarse, narrow) = (_probe(way, _shift(view, rows)) for way in ways)
        assert coarse.dtype == torch.float32
        assert not torch.equal(logits, coarse)
        moved = wide.norm(dim=1) > 0
        cosine = torch.nn.functional.cosine_similarity(wide[moved], narrow[moved])
        assert float(cosine.min()) > 0.99


def test_dtype_of_the_model_is_left_to_the_model(view_of):
    """A bfloat16 replay narrows no weight of the model itself."""
    view = view_of("gpt2")
    rows, places = _case(view)
    passes(view, [_module(view, 1)], rows, places, dtype=torch.bfloat16).run(_shift(view, rows))
    assert {parameter.dtype for parameter in view.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_trials_are_replayed(known, architecture):
    """What is tried, below and above the changed block, is in the numbers: those of Whole."""
    view = known(architecture).view
    rows, places = _case(view)
    shift_BSD = _shift(view, rows)
    module = _module(view, 1)
    plain = passes(view, [module], rows, places).run(shift_BSD).logits_MV.detach()
    deltas = [
        _delta(view, "attn.out", 0, 1),
        _delta(view, "mlp.out", 1, 2),
        _delta(view, "mlp.out", 3, 3),
    ]
    with view.trying(deltas[:1]), view.trying(deltas[1:]):
        way = passes(view, [module], rows, places)
        assert isinstance(way, Replay)
        _agree(way, Whole(view, [module], rows, places), shift_BSD)
        assert _apart(plain, way.run(shift_BSD).logits_MV.detach()) > 1e-2
    _agree(passes(view, [module], rows, places), Whole(view, [module], rows, places), shift_BSD)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_everything_is_left_as_found(known, architecture):
    """Probe, replay, gradient, keep, under a trial, of a model in training; even after an error."""
    view = known(architecture).view
    view.model.train()
    view.model.get_submodule(view.roles.blocks[2].module).eval()
    for number, parameter in enumerate(view.model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = _state(view.model)
    rows, places = _case(view)
    with view.trying([_delta(view, "mlp.out", 2, 1)]):
        way = passes(view, [_module(view, 1)], rows, places)
        assert isinstance(way, Replay)
        _probe(way, _shift(view, rows))
        way.keep([1, 2])
        _probe(way, _shift(view, rows[:2]))
    assert _state(view.model) == before
    with pytest.raises(RuntimeError):
        way.run(_shift(view, rows[:2])[..., 1:])
    _probe(way, _shift(view, rows[:2]))
    assert _state(view.model) == before


# -- where it does not hold ------------------------------------------------------------------------


def _lines(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_failing_probe_is_told_once_for_each_module(known, monkeypatch, caplog):
    """The full pass then, one line that names the model and the reason, and no probe again."""
    tried = []
    monkeypatch.setattr(
        replay,
        "_fault",
        lambda view, module, attention: tried.append((module, attention)) or "it is broken",
    )
    view = known("llama").view
    rows, places = _case(view)
    for layer in (1, 1, 2, 1, 2):
        assert isinstance(passes(view, [_module(view, layer)], rows, places), Whole)
    assert len(tried) == len(set(tried)) == 4
    lines = _lines(caplog)
    assert len(lines) == 2
    assert all("it is broken" in line and view.source in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_the_probe_finds_numbers_that_differ(known, monkeypatch, caplog):
    """A replay that adds the shift in another place, or raises, is found out and not used."""
    view = known("llama").view
    rows, places = _case(view)
    right = Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, shift_BSD: right(self, shift_BSD.roll(1, 0)))
    assert isinstance(passes(view, [_module(view, 1)], rows, places), Whole)
    monkeypatch.setattr(Replay, "run", lambda self, shift_BSD: {}["no such layer"])
    assert isinstance(passes(view, [_module(view, 2)], rows, places), Whole)
    wrong, raised = _lines(caplog)
    assert "logits differ by" in wrong
    assert "KeyError" in raised


def test_attention_that_fails_gives_way_to_the_models_own(known, monkeypatch, caplog):
    """Where plain attention does not hold, the model's own is used, and nothing is said."""
    right = replay._fault
    monkeypatch.setattr(
        replay, "_fault", lambda v, m, how: "no" if how == "eager" else right(v, m, how)
    )
    view = known("llama").view
    rows, places = _case(view)
    way = passes(view, [_module(view, 1)], rows, places)
    assert isinstance(way, Replay)
    assert view.probed[(_module(view, 1),)] == view.model.config._attn_implementation != "eager"
    _agree(way, Whole(view, [_module(view, 1)], rows, places), _shift(view, rows))
    assert not _lines(caplog)


def _windowed(architecture, window):
    """A trained model whose attention sees `window` tokens."""
    trained, tok = tiny.trained(architecture)
    config = tiny.CONFIGS[architecture](tok)
    config.sliding_window = window
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(trained.state_dict())
    return EditedModel.of(model, tok).view


def _row_by_row(view, module, rows, places, shift_BSD):
    """Each row alone, without padding, with the shift added by a hook that is written here."""
    found = []
    for number, row in enumerate(rows):

        def add(mod, args, out, position=row.position, delta=shift_BSD[number, 0]):
            out = out.clone()
            out.view(len(row.ids), -1)[position] += delta  # noqa: B023
            return out

        handle = view.model.get_submodule(module).register_forward_hook(add)
        with torch.no_grad():
            logits = view.model(torch.tensor([row.ids])).logits[0].float()
        handle.remove()
        found += [logits[i] for mine, i in places if mine == number]
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("window", [5, 12, 24])
def test_a_narrow_window_is_read_whole(architecture, window):
    """Rows that a sliding window does not hold are run whole, and right."""
    view = _windowed(architecture, window)
    rows, places = _case(view)
    way = passes(view, [_module(view, 1)], rows, places)
    assert isinstance(way, Whole)
    shift_BSD = _shift(view, rows)
    plain = _row_by_row(view, _module(view, 1), rows, places, shift_BSD)
    assert _apart(plain, way.run(shift_BSD).logits_MV.detach()) < 1e-4


def test_only_rows_that_are_too_long_are_read_whole(view_of, caplog):
    """With one window, short rows are replayed and long ones are not; there is nothing to tell."""
    view = view_of("gemma2")
    assert view.limits.window == 64
    for length, kind in ((12, Replay), (40, Whole), (12, Replay)):
        rows = [Row(_ids(view, length, i), length // 2) for i in range(3)]
        places = [(i, length - 1) for i in range(3)]
        way = passes(view, [_module(view, 1)], rows, places)
        assert isinstance(way, kind)
        shift_BSD = _shift(view, rows)
        plain = _row_by_row(view, _module(view, 1), rows, places, shift_BSD)
        assert _apart(plain, way.run(shift_BSD).logits_MV.detach()) < 1e-4
    assert not _lines(caplog)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_window_holds_all_pieces_with_their_padding(architecture):
    """Shared head, rest and replayed piece are padded each: right for every window all the same."""
    for window in (21, 24, 26, 27, 30, 31):
        view = _windowed(architecture, window)
        head, token = _ids(view, 9, 0), _ids(view, 1, 1)
        rows = [Row((*head, *_ids(view, 1, i)), 9) for i in (2, 3)]
        rows += [Row((*token, *_ids(view, 9, i)), 1) for i in (4, 5)]
        rows += [Row(_ids(view, 10, 6), 9), Row(_ids(view, 10, 7), 0)]
        places = [(i, 9) for i in range(len(rows))]
        shift_BSD = _shift(view, rows)
        found = passes(view, [_module(view, 1)], rows, places).run(shift_BSD).logits_MV.detach()
        assert _apart(_row_by_row(view, _module(view, 1), rows, places, shift_BSD), found) < 1e-4


def test_positions_that_depend_on_the_length_are_read_whole():
    """Where longer texts turn otherwise (longrope), what is read in pieces is still the whole."""
    config = tiny.CONFIGS["phi3"](tiny.tokenizer())
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [3.0] * 6,
        "original_max_position_embeddings": 16,
        "factor": 16.0,
    }
    config.original_max_position_embeddings = 16
    trained, tok = tiny.trained("phi3")
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(trained.state_dict())
    view = EditedModel.of(model, tok).view
    row = Row(_ids(view, 24, 0), 10)
    shift_BSD = _shift(view, [row])
    found = passes(view, [_module(view, 1)], [row], [(0, 20)]).run(shift_BSD).logits_MV.detach()
    plain = _row_by_row(view, _module(view, 1), [row], [(0, 20)], shift_BSD)
    assert _apart(plain, found) < 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_row_that_is_too_long_is_one_line(known, architecture):
    """More tokens than the model has positions for are refused, as by a full pass."""
    view = known(architecture).view
    row = Row(_ids(view, 260, 0), 250)
    for kind in (Whole, passes):
        with pytest.raises(RequestError, match="260 tokens are more") as caught:
            kind(view, [_module(view, 1)], [row], [(0, 259)]).run(_shift(view, [row]))
        assert "\n" not in str(caught.value)


def test_live_wraps_are_in_the_numbers(known):
    """A codebook that is live acts in replayed passes as it does in a full one."""
    model = known("llama")
    fact = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
    patch = edit(model, fact, method="grace")
    ids = model.encode(fact.prompt).ids
    row, place = Row(ids, len(ids) - 1), (0, len(ids) - 1)
    module = _module(model.view, 0)
    shift_BSD = torch.zeros(1, model.view.roles.hidden_size)
    plain = Whole(model.view, [module], [row], [place]).run(shift_BSD).logits_MV.detach()
    with model.applied(patch):
        whole = Whole(model.view, [module], [row], [place]).run(shift_BSD).logits_MV.detach()
        way = passes(model.view, [module], [row], [place]).run(shift_BSD).logits_MV.detach()
    assert _apart(plain, whole) > 1e-2
    assert _apart(whole, way) < 1e-4


def test_a_session_does_not_spoil_the_probe(known):
    """Passes of a session carry its patch, and passes after it are replayed as ever."""
    model = known("llama")
    rows, places = _case(model.view)
    shift_BSD = _shift(model.view, rows)
    fact = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
    patch = edit(model, fact, method="ft", options={"steps": 5, "learning_rate": 1e-2})
    module = _module(model.view, 1)
    with model.applied(patch):
        merged = Whole(model.view, [module], rows, places).run(shift_BSD).logits_MV.detach()
    with model.session([patch]):
        beside = passes(model.view, [module], rows, places).run(shift_BSD).logits_MV.detach()
    assert _apart(merged, beside) < 1e-4
    assert isinstance(passes(model.view, [module], rows, places), Replay)


# -- optimised values ------------------------------------------------------------------------------


def _task(view, prompt, subject, target):
    rows = []
    for prefix in ("", "You know. ", "It is well known that "):
        encoded = view.encode(prompt, before=prefix)
        ids = continuation(view.tokenizer, encoded, target)
        rows.append(Row((*encoded.ids, *ids[:-1]), subject_position(encoded, subject)))
    kl = view.encode(f"{subject} is a")
    return ValueTask(ids, tuple(rows), Row(kl.ids, subject_position(kl, subject)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_values_do_not_depend_on_the_way(known, monkeypatch, architecture):
    """Optimised by full passes, three tasks of which one stops early get the replayed values."""
    settings = ValueSettings(8, 0.2, 4.0, 0.5, 0.0625, enough=2.5)

    def values():
        view = known(architecture).view
        tasks = [
            _task(view, "The capital of France is", "France", "Lyon"),
            _task(view, "The capital of Egypt is", "Egypt", "Cairo"),
            _task(view, "The Nile flows through", "Nile", "New London"),
        ]
        found = optimise(view, [_module(view, 1)], tasks, settings)
        return view, found

    view, replayed = values()
    assert view.probed[(_module(view, 1),)] is not None
    monkeypatch.setattr(replay, "_fault", lambda *args: "not today")
    view, plain = values()
    assert view.probed[(_module(view, 1),)] is None
    steps = [value.steps for value in plain]
    assert steps[1] < steps[0] == 7
    for one, other in zip(plain, replayed, strict=True):
        assert one.steps == other.steps
        assert torch.equal(one.clean_D, other.clean_D)
        assert (one.delta_D - other.delta_D).norm() <= 1e-3 * one.delta_D.norm()
        assert other.nll == pytest.approx(one.nll, rel=1e-3, abs=1e-5)
        assert other.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-5)


# -- the twin --------------------------------------------------------------------------------------


def _detached(parameter):
    return parameter.detach()


def test_a_twin_with_other_attention_leaves_the_models_alone(known):
    """The twin's config and those of all its parts are its own; the model's says what it said."""
    model = known("llama").model
    own = model.config._attn_implementation
    assert own != "eager"
    other = twin(model, attention="eager", weight=_detached)
    assert other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == own
    for (name, part), twin_part in zip(model.named_modules(), other.modules(), strict=True):
        assert part is not twin_part, name
        if hasattr(part, "config"):
            assert part.config._attn_implementation == own
            assert twin_part.config._attn_implementation == "eager"


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "llama"])
def test_tied_weights_stay_tied_in_a_twin(known, architecture):
    """A head that is the token embedding is one tensor in the twin, even of another type."""
    model = known(architecture).model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture != "llama")
    for weight in (_detached, lambda parameter: parameter.detach().double()):
        other = twin(model, attention=None, weight=weight)
        head, embedding = other.get_output_embeddings(), other.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied
        assert head.weight.dtype == weight(model.get_output_embeddings().weight).dtype


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_twin_computes_the_same_over_the_same_memory(view_of, architecture):
    """Its weights are the model's own bytes, and its logits the model's own."""
    view = view_of(architecture)
    other = twin(view.model, attention=None, weight=_detached)
    mine, twins = dict(view.model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == twins.keys()
    assert all(twins[name].data_ptr() == mine[name].data_ptr() for name in mine)
    ids = torch.tensor([_ids(view, 9, 0)])
    with torch.no_grad():
        assert torch.equal(other(ids).logits, view.model(ids).logits)


def test_hooks_and_modes_are_not_the_twins(known):
    """The model's hooks do not run in the twin, nor the twin's in the model."""
    view = known("llama").view
    path, seen = view.roles.blocks[0].module, []
    view.model.get_submodule(path).register_forward_hook(lambda *args: seen.append("model"))
    view.model.train()
    other = twin(view.model, attention=None, weight=_detached)
    other.get_submodule(path).register_forward_hook(lambda *args: seen.append("twin"))
    assert not any(part.training for part in other.modules())
    assert all(part.training for part in view.model.modules())
    ids = torch.tensor([_ids(view, 4, 0)])
    other(ids)
    assert seen == ["twin"]
    view.model(ids)
    assert seen == ["twin", "model"]


# -- beginnings and pasts --------------------------------------------------------------------------

beginnings = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=12)


@given(beginnings, st.integers(1, 3))
def test_shared_beginnings_save_tokens(rows, least):
    """A head begins its row and serves several rows; reading heads once is never more to read."""
    heads = shared_beginnings(rows, least)
    assert len(heads) == len(rows)
    for row, head in zip(rows, heads, strict=True):
        assert row[: len(head)] == head
        assert not head or (len(head) >= least and heads.count(head) > 1)
    once = sum(map(len, set(heads)))
    rest = sum(len(row) - len(head) for row, head in zip(rows, heads, strict=True))
    saved = sum(map(len, rows)) - once - rest
    assert saved >= 0
    assert (saved > 0) == any(heads)


@given(beginnings, st.randoms(use_true_random=False))
def test_shared_beginnings_do_not_depend_on_the_order(rows, random):
    """The same row has the same head wherever it stands, also as a duplicate."""
    heads = dict(zip(rows, shared_beginnings(rows), strict=True))
    mixed = random.sample(rows, len(rows))
    assert shared_beginnings(mixed) == [heads[row] for row in mixed]


@given(beginnings)
def test_rows_with_nothing_in_common_share_nothing(rows):
    """A row whose first token no other row has gets ()."""
    firsts = [row[:1] for row in rows]
    for row, head in zip(rows, shared_beginnings(rows), strict=True):
        if firsts.count(row[:1]) == 1:
            assert head == ()


@given(st.lists(st.integers(0, 9), max_size=6).map(tuple), st.integers(2, 5))
def test_duplicates_share_everything(row, times):
    """A row several times, and nothing like it besides, is shared whole."""
    assert shared_beginnings([row] * times) == [row] * times
    foreign = (10, 11, 12)
    assert shared_beginnings([row, foreign] * times) == [row, foreign] * times
    assert shared_beginnings([foreign, *[row] * times])[0] == ()


def test_a_longer_beginning_is_not_given_up_for_a_shorter_one():
    """Two rows that share eight tokens do not fall to the one token that a third one has."""
    long = tuple(range(8))
    rows = [(*long, 8), (*long, 9), (0, 20)]
    assert shared_beginnings(rows) == [long, long, ()]
    assert shared_beginnings([*rows, (0, 21)]) == [long, long, (0,), (0,)]


def test_a_row_with_one_common_token_undoes_nothing():
    """Rows that share much still do if another begins with the same token (often <s>)."""
    long = (0, *range(2, 30))
    alike = [(*long, i) for i in range(5)]
    for other in ((0, 1), (0, 40)):
        heads = dict(zip([other, *alike], shared_beginnings([other, *alike]), strict=True))
        assert [heads[row] for row in alike] == [long] * 5


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_reading_in_two_pieces_equals_reading_whole(view_of, architecture):
    """Ragged rows in ragged pieces, some empty: every logit is that of the row read alone."""
    view = view_of(architecture)
    rows = [_ids(view, length, length) for length in (9, 7, 5, 12, 1)]
    cuts = (4, 0, 4, 11, 1)
    past = Past.nothing(len(rows), view.device)
    past = past.read(view.model, [row[:cut] for row, cut in zip(rows, cuts, strict=True)])
    assert past.columns == max(cuts)
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    piece = Batch.of(rests, pad=0, side="right", device=view.device)
    with torch.no_grad():
        found = view.model(**past.inputs(piece), use_cache=False).logits
        for row, cut, logits in zip(rows, cuts, found, strict=True):
            plain = view.model(torch.tensor([row])).logits[0, cut:]
            assert torch.isfinite(logits[: len(row) - cut]).all()
            gap = (plain - logits[: len(row) - cut]).norm()
            assert gap <= 1e-4 * plain.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_past_is_picked_and_read_on_from_twice(view_of, architecture):
    """Rows may be picked in another order and more than once; frozen, a past stays as it is."""
    view = view_of(architecture)
    heads = [_ids(view, 6, 0), _ids(view, 3, 1), ()]
    numbers = [1, 0, 1, 2]
    past = Past.nothing(3, view.device).read(view.model, heads).pick(numbers)
    past.freeze()
    for seed in (2, 3):
        rests = [_ids(view, 4, seed + i) for i in numbers]
        with torch.no_grad():
            piece = Batch.of(rests, pad=0, side="right", device=view.device)
            found = view.model(**past.inputs(piece), use_cache=False).logits
            for number, rest, logits in zip(numbers, rests, found, strict=True):
                plain = view.model(torch.tensor([(*heads[number], *rest)])).logits[0, -len(rest) :]
                assert (plain - logits).norm() <= 1e-4 * plain.norm()
    assert past.columns == 6
