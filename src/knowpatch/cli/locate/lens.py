"""`knowpatch locate lens`: what each block would say next, without and with patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Json, Model, Patches, check_writable, read_patches

if TYPE_CHECKING:
    from knowpatch.edited import EditedModel
    from knowpatch.locate.lens import Lens
    from knowpatch.patch import Patch

TOKENS, LETTERS = 2, 9
"""Tokens whose predictions the table shows, with patches (twice as many without); of a word."""
NEW, OLD = "target", "old answer"


def run(
    prompt: Annotated[str, typer.Argument(help="The question, or the beginning of a text.")],
    patch: Patches = None,
    target: Annotated[
        str | None, typer.Option(help="An answer to follow; by default the patch's own.")
    ] = None,
    old: Annotated[
        str | None, typer.Option(help="Another one; by default what the model says unedited.")
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The logit lens: what each block's output would say next, over blocks and tokens."""
    from knowpatch.editing import load
    from knowpatch.errors import InputError
    from knowpatch.locate.canvas import check_picture, saved
    from knowpatch.locate.lens import before_and_after
    from knowpatch.locate.lens_picture import lens_picture

    if not prompt.strip():
        raise InputError("the prompt is empty; give a question")
    check_writable(out)
    check_picture(out)
    patches = read_patches(patch)
    with screen.reporting() as report:
        edited = load(model, device=device, progress=report)
        answers = _answers(edited, prompt, patches, target, old)
        without, changed = before_and_after(edited, prompt, patches, answers)
    if out is not None:
        names = ", ".join(f"{one.provenance.method} {one.id[:12]}" for one in patches)
        title = f"{prompt}   (patch: {names})" if patches else prompt
        saved(lens_picture(edited.view, without, changed, title), out)
    if as_json:
        screen.print_json(_facts(edited, prompt, patches, without, changed, out))
    else:
        _show(edited, without, changed, out)


def _answers(
    edited: EditedModel,
    prompt: str,
    patches: Sequence[Patch],
    target: str | None,
    old: str | None,
) -> dict[str, int]:
    """The first tokens of the answers that are followed, by what they are."""
    from knowpatch.parts.spans import continuation

    encoded = edited.encode(prompt)
    requests = [one for patch in patches for one in patch.provenance.requests]
    mine = [one for one in requests if one.prompt.strip() == prompt.strip()] or requests
    if target is None and mine:
        target = mine[-1].target
    found = {}
    if target is not None:
        found[NEW] = continuation(edited.tokenizer, encoded, target)[0]
    if old is not None:
        found[OLD] = continuation(edited.tokenizer, encoded, old)[0]
    elif encoded.ids:
        place = [(0, len(encoded.ids) - 1)]
        logits_MV = edited.view.run([encoded.ids], logits_at=place).logits_MV
        found[OLD] = int(logits_MV[0].argmax())
    return found


def _facts(
    edited: EditedModel,
    prompt: str,
    patches: Sequence[Patch],
    without: Lens,
    changed: Lens | None,
    out: Path | None,
) -> dict[str, Any]:
    from knowpatch.locate.lens import plain

    crossing = {
        name: found.crosses(NEW, OLD)
        for name, found in (("without", without), ("with", changed))
        if found is not None and NEW in found.answers
    }
    return {
        "model": edited.view.source,
        "prompt": prompt,
        "patches": [one.id for one in patches],
        "answers": {name: edited.view.decode([token]) for name, token in without.answers.items()},
        "without": plain(without, edited.view),
        "with": None if changed is None else plain(changed, edited.view),
        "crosses": crossing,
        "picture": None if out is None else str(out),
    }


def _show(edited: EditedModel, without: Lens, changed: Lens | None, out: Path | None) -> None:
    from knowpatch.locate.lens_picture import state_name, word

    console = screen.out()
    tokenizer = edited.tokenizer
    shown = [without] if changed is None else [without, changed]
    named = {name: word(tokenizer.decode([token])) for name, token in without.answers.items()}
    count = min(TOKENS if changed else 2 * TOKENS, len(without.tokens))
    tokens = [escape(word(token, LETTERS)) for token in without.tokens[-count:]]
    heads = [*tokens, *(f"rank of {escape(text)}" for text in named.values())]
    table = Table("block", *heads, *(f"{head} *" for head in heads * (len(shown) - 1)))
    for state in range(len(without.kl_LT)):
        cells = []
        for one in shown:
            cells += [_cell(tokenizer, one, state, column) for column in range(-count, 0)]
            cells += [str(int(rank)) for rank in one.rank_LTA[state, -1]]
        table.add_row(state_name(state), *cells)
    console.print(table)
    star = "" if changed is None else "; *: with the patch"
    console.print(f"numbers behind words: probability in %{star}", markup=False)
    for line in _summary(named, without, changed):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"picture {escape(str(out))}", soft_wrap=True)


def _cell(tokenizer: Any, found: Lens, state: int, column: int) -> str:
    from knowpatch.locate.lens_picture import word

    token, p = int(found.top_LTK[state, column, 0]), float(found.top_p_LTK[state, column, 0])
    return f"{escape(word(tokenizer.decode([token]), LETTERS))} [dim]{100 * p:.0f}[/]"


def _summary(named: dict[str, str], without: Lens, changed: Lens | None) -> list[str]:
    """From which block on an answer is near, and ahead, at the last token."""
    from knowpatch.locate.lens import SMALLEST
    from knowpatch.locate.lens_picture import state_name

    lines = []
    for when, found in (("without", without), ("with", changed)):
        if found is None:
            continue
        words = "" if changed is None else f"{when} the patch "
        for name, text in named.items():
            near, first = found.enters(name, SMALLEST), found.enters(name, 1)
            told = "never" if near is None else f"from block {state_name(near)} on"
            top = "never the first" if first is None else f"the first at block {state_name(first)}"
            lines.append(f"{words}{text!r} ({name}) is among the first {SMALLEST} {told}, {top}")
        if NEW in named and OLD in named:
            crossing = found.crosses(NEW, OLD)
            told = "never" if crossing is None else f"from block {state_name(crossing)} on"
            lines.append(f"{words}{named[NEW]!r} stays ahead of {named[OLD]!r} {told}")
    return lines
