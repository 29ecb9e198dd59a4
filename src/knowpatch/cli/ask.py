"""`knowpatch ask`: the answer without and with patches."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from knowpatch.cli import screen
from knowpatch.cli.options import Device, Dtype, Json, Model, Patches, read_patches


def run(
    prompt: Annotated[str, typer.Argument(help="The question, or the beginning of a text.")],
    patch: Patches = None,
    model: Model = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Ask a model, without and with patches."""
    from knowpatch.ask import Ask
    from knowpatch.editing import load
    from knowpatch.errors import InputError

    if not prompt.strip():
        raise InputError("the prompt is empty; give a question")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not text in UTF-8; give it in UTF-8") from None
    patches = read_patches(patch)
    with screen.reporting() as report:
        edited = load(model, device=device, dtype=dtype, progress=report)

        def said() -> str:
            ask = Ask(edited, progress=report)
            future = ask.generate(prompt, max_new_tokens=max_new_tokens, chat=chat)
            return future.result().text.strip()

        without = said()
        with edited.applied(*patches):
            changed = said() if patches else None
    if as_json:
        screen.print_json(
            {
                "model": edited.view.source,
                "prompt": prompt,
                "patches": [item.id for item in patches],
                "without": without,
                "with": changed,
            }
        )
        return
    console = screen.out()
    console.print(f"[dim]{escape(edited.view.source)}[/]")
    console.print("[bold]without[/]" if patches else "[bold]answer[/]")
    console.print(without, markup=False)
    if changed is not None:
        console.print("\n[bold]with " + ", ".join(item.id[:12] for item in patches) + "[/]")
        console.print(changed, markup=False)
