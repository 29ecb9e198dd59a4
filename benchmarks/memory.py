"""Asking a model beside a large memory against asking it alone.

    python benchmarks/memory.py [row_1000 row_100000 token_1000 token_100000] [--json] [--quick]

Eight questions are asked in one batch, 16 new tokens each, with so many synthetic entries and
without; the cost of ours is over the unedited model. row: a codebook that decides once for each
prompt (Hopfield, keys of whole prompts); token: a table in which every token is looked up, those
of the answers included. Keys are spread as those of the control prompts are (their centred
covariance), none is near enough to fire; the tokens that the table's entries answer at are those
of the questions, so that every token of a prompt is searched for. Joining the entries, once for
each set of patches, is not counted; the bytes of an entry are those of its tensors in the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pairs import Pair, arguments, measure, report
from torch import Tensor
from torch.nn.functional import normalize

from knowpatch import Patch, __version__, load
from knowpatch.models.roles import LinearRole
from knowpatch.models.sites import listening
from knowpatch.parts.inputs import Inputs, centre, read_inputs
from knowpatch.parts.kinds.hopfield import ending, hopfield, query
from knowpatch.parts.kinds.residuals import RESIDUALS, unit
from knowpatch.patch import Provenance, Wrap
from knowpatch.probes import controls

COUNT, TOKENS = 8, 16
NAMES = ("row_1000", "row_100000", "token_1000", "token_100000")
ROW, TOKEN = 29 / 32, 6 / 30
"""Depths of the blocks that the two kinds of memory stand at."""
THRESHOLD = 0.9


@dataclass(frozen=True)
class Place:
    """A map, the mean of what enters it, and what enters it in the control prompts."""

    role: LinearRole
    mean_I: Tensor
    read: list[Inputs]


class Bench:
    """A model and its questions."""

    def __init__(self, *, quick: bool) -> None:
        self.model = load()
        self.view = self.model.view
        self.rounds = 1 if quick else 5
        self.tokens = 4 if quick else TOKENS
        self.prompts = [self.view.encode(text).ids for text in controls()[:COUNT]]
        self.draw = torch.Generator().manual_seed(0)

    def place(self, depth: float) -> Place:
        blocks = len(self.view.roles.blocks)
        role = self.view.roles.linear("mlp.out", min(blocks - 1, round(depth * blocks)))
        read = read_inputs(self.view, role.module, controls())
        return Place(role, centre(self.view, role.module), read)

    def pair(self, name: str) -> Pair:
        kind, _, count = name.partition("_")
        wrap = self.row(int(count)) if kind == "row" else self.table(int(count))
        provenance = Provenance(
            method="benchmark",
            config={},
            seed=0,
            fingerprint=self.view.fingerprint,
            requests=(),
            version=__version__,
        )
        patch = Patch(provenance, wraps=(wrap,))

        def plain() -> None:
            self.view.generate(self.prompts, max_new_tokens=self.tokens)

        def ours() -> None:
            with self.model.session([patch]):
                plain()

        with listening() as heard:
            ours()  # joins the entries, once
        assert heard, "nothing was looked up"
        assert not any(firing.fired for firing in heard), "an entry fired"
        settings = {"entries": int(count), "questions": COUNT, "new tokens": self.tokens}
        settings["threads"] = torch.get_num_threads()
        settings["bytes per entry"] = round(_bytes(wrap) / int(count))
        pair = measure(
            name,
            ours,
            plain,
            n=self.rounds,
            unit="s per batch",
            settings=settings,
        )
        settings["cost of ours over unedited"] = round(1 / pair.ratio, 3)
        return pair

    def row(self, count: int) -> Wrap:
        place = self.place(ROW)
        means_NI = torch.stack([ending(one.inputs_TI) for one in place.read])
        keys_NI = self.spread(query(means_NI, place.mean_I), count)
        values_ND = torch.randn(count, self.view.roles.hidden_size, generator=self.draw)
        return hopfield(place.role.module, keys_NI, values_ND, place.mean_I, THRESHOLD)

    def table(self, count: int) -> Wrap:
        place = self.place(TOKEN)
        inputs_MI = torch.cat([one.inputs_TI[1:] for one in place.read])
        ids = sorted({i for prompt in self.prompts for i in prompt})
        return Wrap(
            module=place.role.module,
            kind=RESIDUALS,
            data={
                "tokens": [ids[i % len(ids)] for i in range(count)],
                "subjects": [str(i) for i in range(count)],
            },
            tensors={
                "keys": self.spread(unit(inputs_MI, place.mean_I), count),
                "residuals": torch.randn(count, self.view.roles.hidden_size, generator=self.draw),
                "thresholds": torch.full((count,), THRESHOLD),
                "mean": place.mean_I,
            },
        )

    def spread(self, like_MI: Tensor, count: int) -> Tensor:
        """Directions with the covariance of real ones, each of a share of its own besides."""
        found = []
        for start in range(0, count, 10_000):
            some = min(10_000, count - start)
            mixed_NI = torch.randn(some, len(like_MI), generator=self.draw) @ like_MI
            own_NI = torch.randn(some, like_MI.shape[1], generator=self.draw)
            found.append(normalize(normalize(mixed_NI, dim=1) + normalize(own_NI, dim=1), dim=1))
        return torch.cat(found)


def _bytes(wrap: Wrap) -> int:
    """What the entries' tensors take up, without what all share."""
    return sum(t.nbytes for name, t in wrap.tensors.items() if name != "mean")


def main() -> None:
    args = arguments(__doc__ or "")
    bench = Bench(quick=args.quick)
    report([bench.pair(name) for name in args.pairs or NAMES], as_json=args.json)


if __name__ == "__main__":
    main()
