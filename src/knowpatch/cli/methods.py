"""`knowpatch methods`: what there is to choose from, made from the registry."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from knowpatch.cli import screen
from knowpatch.cli.options import Json

Names = Annotated[list[str] | None, typer.Argument(help="Only these methods.", show_default="all")]


def run(names: Names = None, as_json: Json = False) -> None:
    """List the editing methods, their options, and when to choose which."""
    facts = [describe(name) for name in names or _names()]
    if as_json:
        screen.print_json(facts)
        return
    console = screen.out()
    for fact in facts:
        console.print(f"[bold]{fact['name']}[/]  {fact['summary']}")
        console.print(f"    choose it: {fact['choose']}")
        console.print(f"    {fact['family']}; {fact['paper']}")
        yes = [word for word in ("batch", "sequential") if fact[word]]
        console.print(
            f"    needs: {', '.join(['prompt', 'target', *fact['needs']])}"
            f"; {', '.join(yes) or 'one at a time'}"
            f"; ships as: {', '.join(['patch', *_ways(fact['ships'])])}"
        )
        if fact["presets"]:
            console.print(f"    presets: {', '.join(fact['presets'])}")
        for option in fact["options"]:
            default = "" if option["default"] is None else f"={option['default']}"
            line = f"      --set {option['name']}{default}  {option['description']}"
            console.print(line, style="dim", markup=False)
        console.print()


def _ways(ships: dict[str, str]) -> list[str]:
    """The targets that a method's patches go to, with how where that is not whole."""
    whole = ("exact", "rounded")
    return [
        target if how in whole else f"{target} ({how})"
        for target, how in ships.items()
        if how != "no"
    ]


def _names() -> list[str]:
    from knowpatch.method import METHODS

    return METHODS.names()


def describe(name: str) -> dict[str, Any]:
    """The facts of one method as plain data, options with their defaults included."""
    from knowpatch.export.table import of_method
    from knowpatch.method import METHODS

    method = METHODS.get(name)
    return {
        "name": method.name,
        "family": method.family,
        "paper": method.paper,
        "summary": method.summary,
        "choose": method.choose,
        "needs": list(method.needs),
        "batch": method.batch,
        "sequential": method.sequential,
        "exports": list(method.exports),
        "ships": of_method(method),
        "presets": list(method.presets),
        "options": [
            {"name": name, "default": field.default, "description": field.description or ""}
            for name, field in method.Config.model_fields.items()
        ],
    }
