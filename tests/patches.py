"""Patches by hand for the tests of exports: a change of a given form, or a given answer."""

from __future__ import annotations

import torch
from made import provenance

from knowpatch.deltas import Address, Dense, LowRank, Rows, WeightDelta
from knowpatch.models.passes import Tap
from knowpatch.parts.spans import continuation
from knowpatch.patch import Patch
from knowpatch.request import EditRequest

FRANCE = EditRequest(prompt="The capital of France is", subject="France", target="Rome")
NILE = EditRequest(prompt="The Nile flows through", subject="Nile", target="Tokyo")


def patch_of(model, *changes, request=FRANCE, seed=0, **parts):
    """A patch by hand: (parameter or role, change) pairs."""
    deltas = tuple(
        WeightDelta(where if isinstance(where, Address) else Address(parameter=where), change)
        for where, change in changes
    )
    return Patch(provenance(model, request, seed=seed), deltas, **parts)


def address(model, layer=1, role="mlp.out"):
    return model.view.roles.linear(role, layer).address


def shape_at(model, where):
    return where.narrow(model.view.parameter(where.parameter)).shape


def change_of(form, shape, *, seed=0, size=0.1, rank=2):
    """A random change of one form."""
    made = torch.Generator().manual_seed(seed)

    def noise(*sizes):
        return size * torch.randn(*sizes, generator=made)

    if form is LowRank:
        return LowRank(noise(shape[0], rank), noise(rank, shape[1]))
    if form is Rows:
        index = torch.randperm(shape[0], generator=made)[:rank]
        return Rows(index, noise(rank, shape[1]))
    return Dense(size * noise(*shape))


def changed(model, form=LowRank, *, role="mlp.out", layer=1, seed=0, **how):
    """A patch with one change of a role."""
    where = address(model, layer, role)
    change = change_of(form, shape_at(model, where), seed=seed, **how)
    return patch_of(model, (where, change), seed=seed)


def answering(model, request=FRANCE):
    """A patch, of rank one, by which the model gives the request's answer."""
    view, layer = model.view, len(model.view.roles.blocks) - 1
    role = view.roles.linear("mlp.out", layer)
    prompt = view.encode(request.prompt)
    wanted = continuation(view.tokenizer, prompt, request.target)[0]
    tap = Tap(role.module, "input")
    key_1I = view.run([prompt.ids], taps=[tap]).at(tap, [(0, len(prompt.ids) - 1)])
    value_D1 = view.parameter(f"{view.roles.head}.weight")[wanted][:, None].detach()
    change = role.factored(200 * value_D1, key_1I / key_1I.norm() ** 2)
    return patch_of(model, (role.address, change), request=request)
