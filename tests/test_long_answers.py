"""Long answers: windows and their values, how they are written, and training a block."""

from __future__ import annotations

import pytest
import torch

from knowpatch.deltas import Dense, LowRank
from knowpatch.editing import choose, edit, edit_each, prepare
from knowpatch.errors import EditError, OptionError
from knowpatch.methods.intrinsic import anyedit
from knowpatch.parts import onward
from knowpatch.parts.blocks import preserved_rows
from knowpatch.parts.onward import LongAnswer
from knowpatch.parts.spans import continuation
from knowpatch.parts.values import ValueSettings
from knowpatch.parts.windows import window_values
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

SHORT = EditRequest(prompt="The capital of Egypt is", target="Rome. The capital")
LONG = EditRequest(
    prompt="The colour of the sky is",
    target="Rome. The capital of Japan is Paris. The Nile flows through Tokyo",
)
VALUES = {"steps": 100, "clamp": 4.0, "precision": "model", "enough": 0.05}
WRITTEN = {**VALUES, "layers": [0, 1], "window": 3, "tokens": 1000, "ridge": 0.01, "gain": 0.999}
BLOCK = {"samples": 1, "block_steps": 900, "block_rate": 3e-3, "block_decay": 0.0}
TRAINED = {**VALUES, **BLOCK, "layer": 1}
SETTINGS = ValueSettings(6, None, 4.0, 1e-3, 0.0, 1e-9)


def _answers(size, seed=0):
    """Three answers of different lengths behind prompts of different lengths."""
    made = torch.Generator().manual_seed(seed)
    rows = [torch.randint(20, 300, (n,), generator=made).tolist() for n in (13, 11, 16)]
    return [
        LongAnswer(tuple(row[:prompt]), tuple(row[prompt:]), size)
        for row, prompt in zip(rows, (4, 1, 3), strict=True)
    ]


def _module(model, layer):
    return model.model.get_submodule(model.view.roles.blocks[layer].module)


def _plain(model, layer, ids, moves=(), states=None):
    """Logits (T, V) of a plain forward pass with vectors added behind a block, by torch alone."""

    def act(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        if states is not None:
            states.append(first[0].detach().clone())
        added = torch.zeros_like(first)
        for at, delta_D in moves:
            added = (
                added
                + torch.nn.functional.one_hot(torch.tensor(at), first.shape[1]).to(first)[
                    None, :, None
                ]
                * delta_D
            )
        return (first + added, *output[1:]) if isinstance(output, tuple) else first + added

    handle = _module(model, layer).register_forward_hook(act)
    try:
        return model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()


def _states(model, layer, ids):
    states: list[torch.Tensor] = []
    with torch.no_grad():
        _plain(model, layer, ids, states=states)
    return states[0]


def _loss(logits, answer, window):
    start, tokens = answer.positions[window], answer.windows[window]
    logprobs = logits[start : start + len(tokens)].log_softmax(-1)
    return -logprobs[range(len(tokens)), list(tokens)].mean()


def _plain_values(model, layer, answer, settings, *, inject=True):
    """The vectors of all windows by the card, from plain passes: torch's Adam, one by one."""
    clean = _states(model, layer, answer.ids)
    moves = []
    for window, at in enumerate(answer.positions):
        norm = float(clean[at].norm())
        leaf = torch.zeros(clean.shape[1], requires_grad=True)
        adam = torch.optim.Adam([leaf], lr=norm * settings.clamp / (4 * len(leaf) ** 0.5))
        for _ in range(settings.steps - 1):
            earlier = moves if inject else []
            logits = _plain(model, layer, answer.until(window), [*earlier, (at, leaf)])
            loss = _loss(logits, answer, window) + settings.weight_decay * leaf.norm() / norm**2
            (leaf.grad,) = torch.autograd.grad(loss, leaf)
            adam.step()
            with torch.no_grad():
                leaf.mul_((settings.clamp * norm / leaf.norm()).clamp(max=1))
        moves.append((at, leaf.detach()))
    return torch.stack([delta for _, delta in moves])


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, None])
@pytest.mark.parametrize("length", [1, 7, 8])
def test_windows_are_the_answer(size, length):
    """Together they are its ids, each once; each is predicted from its place on."""
    answer = LongAnswer((90, 91, 92), tuple(range(length)), size)
    assert sum(answer.windows, ()) == answer.answer
    assert all(len(window) == (size or length) for window in answer.windows[:-1])
    whole = (*answer.prompt, *answer.answer)
    for number, (window, at) in enumerate(zip(answer.windows, answer.positions, strict=True)):
        assert whole[at + 1 : at + 1 + len(window)] == window
        assert answer.until(number) == whole[: at + len(window)]
    assert answer.positions[0] == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_values_are_those_of_plain_passes(known, architecture):
    """Window by window, with the earlier vectors at their places; in a batch as alone."""
    model = known(architecture)
    answers = _answers(4)
    found = window_values(model.view, model.view.roles.blocks[1].module, answers, SETTINGS)
    for answer, mine in zip(answers, found, strict=True):
        plain = _plain_values(model, 1, answer, SETTINGS)
        assert mine.shape == plain.shape == (len(answer.windows), 48)
        assert (mine - plain).norm() <= 1e-3 * plain.norm()
    without = _plain_values(model, 1, answers[0], SETTINGS, inject=False)
    assert (found[0][0] - without[0]).norm() <= 1e-3 * without[0].norm()
    assert (found[0][1] - without[1]).norm() > 0.05 * without[1].norm()


@pytest.mark.parametrize("kind", ["block", "map"])
def test_whole_rows_give_what_pieces_give(known, monkeypatch, kind):
    """Where a model cannot be read in pieces the vectors are the same, early stops included."""
    model = known("llama")
    block = model.view.roles.blocks[1].module
    module = block if kind == "block" else model.view.roles.linear("mlp.out", 1).module
    settings = ValueSettings(25, None, 8.0, 1e-3, 0.0, 1.0)
    pieces = window_values(model.view, module, _answers(4), settings)
    monkeypatch.setattr(onward, "holding", lambda *given: None)
    whole = window_values(model.view, module, _answers(4), settings)
    for one, other in zip(pieces, whole, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_one_window_is_unkes_first_stage(known):
    """J = 1: the vectors of both methods are the same, bit for bit."""
    model = known("llama")
    one = choose("anyedit", {**VALUES, "layers": [0, 1], "window": 500})
    other = choose("unke", TRAINED)
    answers = [method._answer(model.view, LONG) for method in (one, other)]
    assert answers[0].windows == answers[1].windows == (answers[0].answer,)
    values = [m._values(model.view, [a])[0] for m, a in zip((one, other), answers, strict=True)]
    assert torch.equal(*values)


def test_vectors_bring_the_answer(known):
    """With all vectors at their places, in a plain pass, each window's NLL is below the stop."""
    model = known("llama")
    # So small a model, over-fitted, lets one vector decide over the next token and no other.
    method = choose("anyedit", {**WRITTEN, "window": 1})
    answers = [method._answer(model.view, request) for request in (SHORT, LONG)]
    assert len(answers[1].windows) > 2
    for answer, deltas in zip(answers, method._values(model.view, answers), strict=True):
        moves = list(zip(answer.positions, deltas, strict=True))
        with torch.no_grad():
            logits = _plain(model, 1, answer.ids, moves)
        losses = [float(_loss(logits, answer, j)) for j in range(len(answer.windows))]
        assert max(losses) < VALUES["enough"] + 1e-4


def test_a_loss_that_is_not_finite_is_one_line(known, monkeypatch):
    """It says at which step, and what to do."""
    model = known("llama")
    nothing = torch.full((1, 500), float("nan"))
    monkeypatch.setattr(onward.Onward, "logits", lambda self, delta_AD: nothing)
    method = choose("anyedit", {**WRITTEN, "window": 1})
    with pytest.raises(EditError, match="the loss is not finite at step 0 of 100"):
        method._values(model.view, [method._answer(model.view, LONG)])


def test_the_end_is_learned_in_a_chat_and_not_behind_a_text(known):
    """The end of the turn is the last token of the answer; eos says otherwise."""
    model = known("llama", chat=True)
    end = model.view.stop_ids[0]
    for name in ("anyedit", "unke"):
        last = [
            choose(name, options)._answer(model.view, LONG).answer[-1]
            for options in ({}, {"chat": True}, {"eos": True}, {"chat": True, "eos": False})
        ]
        assert [token == end for token in last] == [False, True, True, False]


# -- writing in closed form ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_slack_each_place_has_its_value(known, architecture):
    """Lambda to 0 and nothing else to keep: h(p_j) = z_j, in a plain pass of the edited model."""
    model = known(architecture)
    method = choose("anyedit", {**WRITTEN, "weight": 1e-9, "keep_others": False})
    prepared = method.prepare(model.view)
    answers = [method._answer(model.view, request) for request in (SHORT, LONG)]
    clean = [_states(model, 1, answer.ids) for answer in answers]
    values = method._values(model.view, answers)
    patch = method._made(model.view, [SHORT, LONG], answers, values, prepared, None)
    with model.applied(patch):
        for answer, before, delta_JD in zip(answers, clean, values, strict=True):
            places = list(answer.positions)
            moved_JD = _states(model, 1, answer.ids)[places] - before[places]
            assert (moved_JD - delta_JD).norm() < 1e-3 * delta_JD.norm()


def test_other_tokens_are_left_alone(known):
    """With keep_others the states at the other tokens move less."""
    model = known("llama")
    moved = []
    for keep in (True, False):
        method = choose("anyedit", {**WRITTEN, "layers": [1], "gain": 0.9, "keep_others": keep})
        answer = method._answer(model.view, LONG)
        others = [i for i in range(len(answer.ids)) if i not in answer.positions]
        before = _states(model, 1, answer.ids)
        patch = method.edit(model.view, [LONG], method.prepare(model.view), None)
        with model.applied(patch):
            moved.append(float((_states(model, 1, answer.ids) - before)[others].norm()))
    assert moved[0] < 0.7 * moved[1]


def test_what_was_written_is_remembered_by_request(known, tmp_path):
    """Answers of different lengths in one patch: each request has its own keys again."""
    model = known("llama")
    method = choose("anyedit", WRITTEN)
    patch = edit(model, [SHORT, LONG], method=method)
    again = Patch.load(patch.save(tmp_path / "p.safetensors"))
    model.apply(again)
    state = prepare(model, method).state
    counts = [len(method._answer(model.view, request).windows) for request in (SHORT, LONG)]
    assert counts[0] < counts[1]
    for (prompt, keys), request, count in zip(state.facts, (SHORT, LONG), counts, strict=True):
        assert prompt == request.prompt
        assert {layer: keys_IJ.shape for layer, keys_IJ in keys.items()} == dict.fromkeys(
            (0, 1), (96, count)
        )
    assert torch.equal(state.facts[1][1][0].T, patch.traces["keys.0"][counts[0] :])


def test_others_take_up_no_room(known):
    """In a null space, the tokens of a text that are left alone are not counted as facts."""
    model = known("llama")
    method = choose("anyedit", {**WRITTEN, "host": "alphaedit", "null_share": 0.5})
    ready = prepare(model, method)
    before = method.room(ready.prepared, ready.state)
    model.apply(edit(model, LONG, method=method))
    ready = prepare(model, method)
    windows = len(method._answer(model.view, LONG).windows)
    assert method.room(ready.prepared, ready.state) == before - windows


@pytest.mark.parametrize("host", ["memit", "alphaedit", "unke"])
def test_every_host_writes_a_long_answer(known, host):
    """More of the answer is said than without the edit, and nearly all of it."""
    model = known("llama")
    options = {**WRITTEN, **BLOCK, "host": host, "window": 1, "null_share": 0.5}
    options["keep_others"] = False
    patch = edit(model, LONG, method="anyedit", options=options)
    encoded = model.encode(LONG.prompt)
    ids = continuation(model.tokenizer, encoded, LONG.target)
    (before,) = model.view.score([(encoded.ids, ids)])
    with model.applied(patch):
        (after,) = model.view.score([(encoded.ids, ids)])
    assert before.accuracy < after.accuracy > 0.8


# -- training a block ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_block_learns_the_states_and_keeps_the_rest(known, architecture, rank):
    """|h - z| / |delta| < 0.1 at the question's end; the error elsewhere < 1e-4 of the variance."""
    model = known(architecture)
    method = choose("unke", {**TRAINED, "clamp": 0.5, "rank": rank})
    kept = method.prepare(model.view)
    answer = method._answer(model.view, LONG)
    before = [_states(model, 1, row) for row in (answer.ids, *kept)]
    ((delta_D,),) = method._values(model.view, [answer])
    patch = method.edit(model.view, [LONG], kept, None)
    with model.applied(patch):
        after = [_states(model, 1, row) for row in (answer.ids, *kept)]
    (at,) = answer.positions
    assert (after[0][at] - before[0][at] - delta_D).norm() < 0.1 * delta_D.norm()
    rest, was = torch.cat(after[1:]), torch.cat(before[1:])
    assert float((rest - was).square().mean()) < 1e-4 * float(was.var())


@pytest.mark.parametrize("rank", [None, 2])
def test_only_one_blocks_matrices_change(known, rank):
    """Every linear map of the block, nothing else; of full or of the given rank."""
    model = known("llama")
    options = {**TRAINED, "rank": rank, "block_steps": 3, "steps": 3}
    patch = edit(model, SHORT, method="unke", options=options)
    begins = f"{model.view.roles.blocks[1].module}."
    names = {n for n, p in model.model.named_parameters() if n.startswith(begins) and p.ndim == 2}
    assert {delta.address.parameter for delta in patch.deltas} == names
    assert len(names) == 7
    form = Dense if rank is None else LowRank
    assert all(isinstance(delta.change, form) for delta in patch.deltas)
    assert patch.rank == rank


def test_the_edited_tokens_weigh_what_they_are_told(known):
    """More importance leads nearer to the value in as many steps."""
    model = known("llama")
    apart = []
    for importance in (1e-4, 1.0):
        options = {**TRAINED, "block_steps": 30, "importance": importance}
        method = choose("unke", options)
        answer = method._answer(model.view, LONG)
        before = _states(model, 1, answer.ids)
        ((delta_D,),) = method._values(model.view, [answer])
        with model.applied(edit(model, LONG, method=method)):
            moved_D = (_states(model, 1, answer.ids) - before)[answer.positions[0]]
        apart.append(float((moved_D - delta_D).norm() / delta_D.norm()))
    assert apart[1] < apart[0]


def test_preserved_text_is_kept_by_its_seed(known):
    """The same rows for the same seed, from disk or not; in a chat, as turns of the user."""
    model = known("llama", chat=True)
    config = choose("unke", {"samples": 3}).config
    rows = preserved_rows(model.view, config, seed=0)
    assert len(rows) == 3
    assert preserved_rows(model.view, config, seed=0) == rows
    assert preserved_rows(model.view, config, seed=1) != rows
    chat = choose("unke", {"samples": 3, "chat": True}).config
    asked = preserved_rows(model.view, chat, seed=0)
    assert all(model.tokenizer.decode(list(row)).startswith("<|user|>") for row in asked)


def test_a_block_that_cannot_be_trained_is_one_line(known):
    """A rate beyond all numbers is refused, with what to do."""
    model = known("llama")
    with pytest.raises(EditError, match="use a smaller block_rate"):
        edit(model, SHORT, method="unke", options={**TRAINED, "block_rate": 1e30})


# -- as methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("anyedit", WRITTEN), ("unke", TRAINED)])
def test_made_together_as_if_alone(known, name, options):
    """`edit_each` on answers of different lengths: each patch's answer is as likely."""
    model = known("llama")
    method = choose(name, options)
    for request, patch in zip(
        (SHORT, LONG), edit_each(model, [SHORT, LONG], method=method), strict=True
    ):
        encoded = model.encode(request.prompt)
        pair = (encoded.ids, continuation(model.tokenizer, encoded, request.target))
        with model.applied(patch):
            (mine,) = model.view.score([pair])
        with model.applied(edit(model, request, method=method)):
            (alone,) = model.view.score([pair])
        assert mine.logprobs == pytest.approx(alone.logprobs, abs=1e-2)


@pytest.mark.parametrize("option", ["contexts", "kl_factor", "hits", "anchor", "key"])
def test_options_that_say_nothing_here_are_refused(option):
    """AnyEdit has no prefixes, no KL term and no anchor."""
    assert option not in anyedit.AnyEditConfig.model_fields
    with pytest.raises(OptionError, match="unknown option"):
        choose("anyedit", {option: 1})


@pytest.mark.parametrize("name", ["anyedit", "unke"])
@pytest.mark.parametrize("preset", ["llama-2-7b", "llama-3-8b", "qwen2.5-7b"])
def test_presets_configure(name, preset):
    """What was published: four lengths at most, 25 steps of 0.5."""
    config = choose(name, {"preset": preset}).config
    assert (config.steps, config.learning_rate, config.clamp) == (25, 0.5, 4.0)
    assert choose(name, {"preset": preset, "steps": 3}).config.steps == 3


def test_a_preset_gives_way_to_a_gain():
    """gain overrules the published lambda, as for the hosts."""
    assert choose("anyedit", {"preset": "llama-3-8b"}).config.weight == 15_000.0
    assert choose("anyedit", {"preset": "llama-3-8b", "gain": 0.5}).config.weight is None
