"""A workspace at work: fifty edits taken back in random order, and ten thousand in one history.

    python benchmarks/workspace.py [reverts history] [--json] [--quick] [--seed N]

reverts: edits by five methods of all three families on the bundled model, each made on top of the
ones before, taken back in random order; how long a revert takes, whether any set of live edits is
the same bytes however it came about, and whether the base's bytes are back after the last.
history: synthetic patches of rank one; how long `log`, `show`, `revert` and `verify` take as
commands, Python's start included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from string import hexdigits
from time import perf_counter
from typing import Any

import torch

from knowpatch import EditRequest, Patch, __version__, edit, load
from knowpatch.deltas import Address, LowRank, WeightDelta
from knowpatch.edited import EditedModel
from knowpatch.ledger import Circumstances, Edit, Workspace
from knowpatch.ledger.standing import bring
from knowpatch.models.fingerprint import tensor_digest
from knowpatch.patch import Provenance
from knowpatch.probes import subjects

METHODS: Sequence[tuple[str, dict[str, Any]]] = (
    ("ice", {}),
    ("grace", {}),
    ("lora", {}),
    ("ft", {}),
    ("rome", {}),
)
"""External knowledge, a memory beside the weights, an adapter, and two ways to change weights."""
CITIES = ("Rome", "Tokyo", "Cairo", "Madrid", "Berlin", "London", "Vienna")
PROMPTS = ("The home town of {} is", "{} was founded in", "The road from {} leads to")
LOT = 500


def facts(count: int) -> list[EditRequest]:
    """So many facts, no two of which ask the same."""
    names = [name for name in subjects() if name.isascii()]
    made = []
    for number in range(count):
        name = names[number % len(names)]
        prompt = PROMPTS[number // len(names) % len(PROMPTS)].format(name)
        target = CITIES[number % len(CITIES)]
        made.append(EditRequest(prompt=prompt, subject=name, target=target))
    return made


def state(model: EditedModel) -> dict[str, str]:
    """The hash of every tensor of the model."""
    return {name: tensor_digest(tensor) for name, tensor in model.model.state_dict().items()}


def filled(
    model: EditedModel,
    workspace: Workspace,
    methods: Sequence[tuple[str, dict[str, Any]]],
    requests: Sequence[EditRequest],
    told: Callable[[int], None] = lambda number: None,
) -> dict[Edit, Patch]:
    """Edits by the methods in turn, each on top of the ones before, recorded as live."""
    patches: dict[Edit, Patch] = {}
    for number, request in enumerate(requests):
        told(number)
        name, options = methods[number % len(methods)]
        over = workspace.history.number
        patch = edit(model, request, method=name, options=options)
        (made,) = workspace.record([(patch, Circumstances(over))])
        patches[made] = patch
        bring(model, list(patches.values()))
    return patches


def taken_back(
    model: EditedModel, workspace: Workspace, patches: dict[Edit, Patch], chance: random.Random
) -> tuple[list[float], int]:
    """Revert all in random order.

    Returns:
        Seconds of each revert; at how many moments the same live edits, applied afresh on the base,
        were not the same bytes.
    """
    order = list(patches)
    chance.shuffle(order)
    seconds, differ = [], 0
    for number, gone in enumerate(order):
        start = perf_counter()
        workspace.move(reverts=[gone])
        live = [patches[item] for item in workspace.history.live()]
        bring(model, live)
        seconds.append(perf_counter() - start)
        if number % 10 == 5:
            folded = state(model)
            bring(model, [])
            bring(model, live)
            differ += folded != state(model)
    return seconds, differ


def reverts(*, quick: bool, seed: int) -> dict[str, Any]:
    """The first part."""
    count = 10 if quick else 50
    with tempfile.TemporaryDirectory() as folder:
        model, workspace = load(), Workspace.create(Path(folder))
        base = state(model)

        def told(number: int) -> None:
            sys.stderr.write(f"\redit {number + 1} of {count}")

        patches = filled(model, workspace, METHODS, facts(count), told)
        edited = state(model)
        seconds, differ = taken_back(model, workspace, patches, random.Random(seed))
        sys.stderr.write("\n")
        return {
            "edits": count,
            "methods": [name for name, _ in METHODS],
            "tensors_changed": sum(base[name] != edited[name] for name in base),
            "base_bytes_back": state(model) == base,
            "refolded_otherwise": differ,
            "revert_median_s": round(median(seconds), 4),
            "revert_worst_s": round(max(seconds), 4),
            "events": workspace.history.number,
        }


def synthetic(number: int, noise: torch.Generator) -> Patch:
    """A patch of rank one, of the size that an edit of the bundled model has."""
    made = Provenance(
        method="benchmark",
        config={"layer": 5, "steps": 25, "radius": 4.0},
        seed=number,
        fingerprint="0" * 64,
        requests=(
            EditRequest(
                prompt=f"The capital of country {number} is",
                subject=f"country {number}",
                target=f"city {number}",
            ),
        ),
        version=__version__,
    )
    left, right = torch.randn(576, 1, generator=noise), torch.randn(1, 1536, generator=noise)
    address = Address(parameter="model.layers.5.mlp.down_proj.weight")
    return Patch(made, (WeightDelta(address, LowRank(left, right)),))


def history(*, quick: bool, seed: int) -> dict[str, Any]:
    """The second part."""
    count = 1000 if quick else 10_000
    noise = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workspace = Workspace.create(root)
        start = perf_counter()
        for first in range(0, count, LOT):
            sys.stderr.write(f"\r{first} of {count} patches")
            made = [
                (synthetic(number, noise), Circumstances(over=number + 1, took=[True]))
                for number in range(first, first + LOT)
            ]
            workspace.record(made)
        recorded = perf_counter() - start
        sys.stderr.write("\n")
        middle = list(workspace.history.edits)[count // 2]
        return {
            "patches": count,
            "record_each_ms": round(1000 * recorded / count, 2),
            **command(root, "log"),
            **command(root, "log", "--all"),
            **command(root, "show", middle[:16]),
            **command(root, "revert", middle[:16], "--no-ask"),
            **command(root, "verify"),
            "history_bytes": sum(path.stat().st_size for path in workspace.folder.glob("history*")),
        }


def command(root: Path, *words: str) -> dict[str, float]:
    """Seconds of a command by the clock and of the processor (which other programs do not share);
    the best of three where it can be done again."""
    clock, processor = [], []
    for _ in range(1 if words[0] == "revert" else 3):
        start, used = perf_counter(), _used()
        done = subprocess.run(
            [sys.executable, "-m", "knowpatch", *words], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        clock.append(perf_counter() - start)
        processor.append(_used() - used)
    name = "_".join(word.strip("-") for word in words if not set(word) <= set(hexdigits))
    return {f"{name}_s": round(min(clock), 3), f"{name}_cpu_s": round(min(processor), 3)}


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"reverts": reverts, "history": history}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="reverts, history; by default both"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tenth to a fifth of it")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    for name in given.parts or PARTS:
        found = PARTS[name](quick=given.quick, seed=given.seed)
        if given.json:
            print(json.dumps({"part": name, **found}))
            continue
        print(name)
        for fact, value in found.items():
            print(f"  {fact:<20} {value}")


if __name__ == "__main__":
    main()
