"""Roles, views and fingerprints on tiny models of every architecture."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

from knowpatch.deltas import Dense, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.editing import load
from knowpatch.errors import ModelError, OptionError
from knowpatch.method import METHODS
from knowpatch.models.origin import resolve
from knowpatch.models.roles import find_roles

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"}


def _view(architecture):
    return EditedModel.of(*tiny.fresh(architecture)).view


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_block_has_its_maps(architecture):
    """MLP output, MLP input and attention output are found in every block, with their shapes."""
    view = _view(architecture)
    assert len(view.roles.blocks) == 4
    wanted = {"mlp.out": (48, None), "mlp.up": (None, 48), "attn.out": (48, 48)}
    if architecture in GATED:
        wanted["mlp.gate"] = (None, 48)
    if architecture != "gpt_neox":
        wanted |= {"attn.q": (48, 48), "attn.k": (None, 48), "attn.v": (None, 48)}
    for layer in range(4):
        assert set(view.roles.blocks[layer].linears) == set(wanted)
        for role, (out, into) in wanted.items():
            weight = view.weight(view.roles.linear(role, layer))
            assert out in (None, weight.shape[0]), role
            assert into in (None, weight.shape[1]), role


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_orientation_is_right(architecture):
    """W as (out, in) reproduces what the module computes, transposed storage included."""
    from knowpatch.models.passes import Tap

    view = _view(architecture)
    role = view.roles.linear("mlp.out", 2)
    taps = [Tap(role.module, "input"), Tap(role.module, "output")]
    run = view.run([[5, 6, 7, 8]], taps=taps)
    bias = getattr(view.model.get_submodule(role.module), "bias", None)
    expected = run.tapped[taps[0]].reshape(4, -1) @ view.weight(role).T
    expected = expected if bias is None else expected + bias
    assert torch.allclose(run.tapped[taps[1]].reshape(4, -1), expected, atol=1e-5)


def test_fused_gate_and_up_are_two_slices():
    """Phi-3 computes gate and up with one matrix: the gate is its first half."""
    view = _view("phi3")
    gate, up = view.roles.linear("mlp.gate", 0), view.roles.linear("mlp.up", 0)
    assert gate.address.parameter == up.address.parameter
    whole = view.parameter(gate.address.parameter)
    assert torch.equal(torch.cat([view.weight(gate), view.weight(up)]), whole)


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a != "gpt_neox"])
def test_queries_keys_and_values_are_what_they_are_called(architecture):
    """A change of one map moves what the block's cache holds of that kind, and nothing else."""
    view = _view(architecture)

    def cached():
        with torch.no_grad():
            past = view.model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        return past.layers[1].keys, past.layers[1].values

    keys, values = (each.clone() for each in cached())
    for role in ("attn.q", "attn.k", "attn.v"):
        linear = view.roles.linear(role, 1)
        part = linear.address.narrow(view.parameter(linear.address.parameter))
        before = part.detach().clone()
        with torch.no_grad():
            part.mul_(0.5).add_(0.1)
        moved = [not torch.equal(*pair) for pair in zip((keys, values), cached(), strict=True)]
        assert moved == [role == "attn.k", role == "attn.v"], role
        with torch.no_grad():
            part.copy_(before)


def test_fused_queries_keys_and_values_fill_their_matrix():
    """GPT-2 stores them along the columns, Phi-3 along the rows with fewer keys than queries."""
    for architecture, dim in (("gpt2", 1), ("phi3", 0)):
        view = _view(architecture)
        roles = [view.roles.linear(role, 0) for role in ("attn.q", "attn.k", "attn.v")]
        whole = view.parameter(roles[0].address.parameter)
        parts = [role.address.narrow(whole) for role in roles]
        assert torch.equal(torch.cat(parts, dim=dim), whole)


def test_maps_that_mix_heads_say_so():
    """GPT-NeoX interleaves queries, keys and values head by head: no slice is one of them."""
    with pytest.raises(ModelError, match="query_key_value does not hold queries, keys and values"):
        _view("gpt_neox").roles.linear("attn.q", 0)
    codegen = hf.CodeGenConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=50)
    roles = find_roles(hf.AutoModelForCausalLM.from_config(codegen))
    assert "attn.out" in roles.blocks[0].linears
    assert "qkv_proj does not hold" in roles.lacks("attn.v")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_head_at_asked_places_equals_the_full_forward(architecture):
    """Running the head only where asked gives the logits of the plain forward (soft caps too)."""
    view = _view(architecture)
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    places = [(0, 4), (1, 0), (1, 2)]
    found = view.run(rows, logits_at=places).logits_MV
    with torch.no_grad():
        plain = [view.model(torch.tensor([rows[row]])).logits[0, i].float() for row, i in places]
    assert torch.allclose(found, torch.stack(plain), atol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("role", ["mlp.out", "mlp.up", "attn.out", "attn.q", "attn.v"])
def test_a_trial_equals_written_weights_and_leaves_them(architecture, role):
    """A functional trial computes as if the weight were changed, and changes nothing."""
    view = _view(architecture)
    if view.roles.lacks(role):
        pytest.skip(view.roles.lacks(role))
    linear = view.roles.linear(role, 1)
    parameter = view.parameter(linear.address.parameter)
    kept = parameter.detach().clone()
    part = linear.address.narrow(parameter)
    change = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    with view.trying([WeightDelta(linear.address, Dense(change))]):
        tried = view.run([[5, 6, 7]], logits_at=[(0, 2)]).logits_MV
        assert torch.allclose(view.weight(linear), linear.oriented(part + change), atol=1e-6)
    assert torch.equal(parameter, kept)
    with torch.no_grad():
        linear.address.narrow(parameter).add_(change)
    assert torch.allclose(tried, view.run([[5, 6, 7]], logits_at=[(0, 2)]).logits_MV, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(tiny.MIXTURES))
def test_a_mixture_says_what_it_lacks(architecture, tmp_path, caplog):
    """It loads, says which methods cannot edit it, and why."""
    model, tok = tiny.fresh(architecture)
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    edited = load(str(tmp_path))
    refused = ", ".join(name for name in METHODS.names() if METHODS.get(name).roles)
    assert f"cannot be edited by {refused}: its MLP is a mixture of 4 experts" in caplog.text
    able = caplog.text.partition("methods that can: ")[2].split(", ")
    assert {"ice", "scr"} <= {name.strip() for name in able}
    assert "rome" not in able
    with pytest.raises(ModelError, match="mixture of 4 experts"):
        edited.view.roles.linear("mlp.out", 0)


def test_what_is_not_found_is_one_line():
    """A module without decoder blocks is refused with what was seen."""
    with pytest.raises(ModelError, match="has no output head"):
        find_roles(torch.nn.Linear(2, 2))


def test_layers_and_roles_out_of_range():
    """A layer that does not exist is refused with the range."""
    view = _view("llama")
    with pytest.raises(ModelError, match="layers 0 to 3"):
        view.roles.linear("mlp.out", 9)
    with pytest.raises(ModelError, match="roles are"):
        view.roles.linear("mlp.middle", 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_the_fingerprint_is_that_of_the_saved_folder(architecture, tmp_path):
    """In memory, from its folder, in either dtype: one fingerprint; a changed weight: another."""
    model, tok = tiny.fresh(architecture)
    in_memory = EditedModel.of(model, tok).view.fingerprint
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    for dtype in ("float32", "bfloat16", "stored"):
        assert load(str(tmp_path / "m"), dtype=dtype).view.fingerprint == in_memory
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert EditedModel.of(model, tok).view.fingerprint != in_memory


def test_names_of_models(tmp_path):
    """Folder, GGUF file and hub id are told apart by what is there, never by the name's words."""
    folder = tmp_path / "llama" / "qwen"
    folder.mkdir(parents=True)
    assert resolve(str(folder)).kind == "folder"
    assert resolve("somebody/some-model").kind == "hub"
    assert resolve(str(tmp_path / "x.gguf")).kind == "gguf"
    with pytest.raises(ModelError, match="no such model folder"):
        resolve(str(tmp_path / "nothing" / "here"))


def test_device_and_dtype_are_refused_in_one_line(folder):
    """Unknown devices and dtypes name the allowed ones."""
    with pytest.raises(OptionError, match=r"unknown dtype 'float8'.*allowed"):
        load(str(folder), dtype="float8")
    with pytest.raises(OptionError, match=r"did you mean 'cuda'"):
        load(str(folder), device="cude")


def test_generation_is_greedy_ends_at_eos_and_does_not_depend_on_neighbours(known):
    """A batch of rows of different length gives what each row gives alone."""
    view = known("llama").view
    rows = [view.encode(prompt).ids for prompt in tiny.FACTS]
    together = view.generate(rows, max_new_tokens=6)
    alone = [view.generate([row], max_new_tokens=6)[0] for row in rows]
    assert together == alone
    assert view.decode(together[0]).strip().startswith("Paris")


def test_a_row_ends_with_a_text_that_it_is_to_end_with(known, monkeypatch):
    """As if it had been cut there, whoever its neighbours are; and no token more is computed."""
    view = known("llama").view
    rows = [view.tokenizer.encode(prompt) for prompt in list(tiny.FACTS)[:3]]
    whole = view.generate(rows, max_new_tokens=12)
    word = view.decode(whole[0])[2:4]
    cut = [row[: _first_with(view, row, word)] for row in whole]
    seen = []
    view.model.register_forward_hook(lambda *_: seen.append(1))
    assert view.generate(rows, max_new_tokens=12, until=[word]) == cut
    assert view.generate(rows[:1], max_new_tokens=12, until=["no such text", word]) == cut[:1]
    assert len(seen) == max(map(len, cut)) + len(cut[0])


def _first_with(view, ids, word):
    """How many ids it takes until their text has a word; all, if it never has."""
    counts = [n for n in range(1, len(ids) + 1) if word in view.decode(ids[:n])]
    return counts[0] if counts else len(ids)


def test_chat_frames_the_prompt(known):
    """Through the chat template the prompt is the user's turn, and its own words are found."""
    view = known("llama", chat=True).view
    encoded = view.encode("Where is Rome?", chat=True, system="Rome is old.")
    assert encoded.text.startswith("<|system|>\nRome is old.<|end|>")
    assert encoded.text.endswith("<|assistant|>\n")
    assert encoded.text[encoded.content :].startswith("Where is Rome?")
    with pytest.raises(OptionError, match="no chat template"):
        known("llama").view.encode("Where is Rome?", chat=True)
