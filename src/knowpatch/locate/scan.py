"""Scan: what was done to a model, read off its weights beside those of its base.

Which matrices differ, by which rank and how much; and of a change of few directions in an MLP's
map, at which subjects it points: those at whose keys (what enters the map at the subject's last
token, behind neutral words) it acts most, beside how it acts at a typical subject's. A locate-then-
edit method writes at its subject's key, so its subject stands out, if it is among those that are
asked for; a change that acts alike at all of them says nothing of subjects. What a change writes
there is a direction in the residual stream, which the head reads as words (locate/vocabulary.py).
Axes: N subjects, D outputs and I inputs of a map, S singular values, K rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from knowpatch.errors import DataError
from knowpatch.locate.change import Changed, matrices
from knowpatch.locate.vocabulary import WRITING, words
from knowpatch.models.compare import Difference, differences
from knowpatch.models.passes import Tap
from knowpatch.models.view import ModelView
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import subject_position
from knowpatch.probes import subjects
from knowpatch.progress import Progress, silent
from knowpatch.reading import decode, read_bytes

LOW = 0.25
"""Share of a matrix's own rank up to which a change is one of few directions."""
LEADS = ("About {}", "The story of {}", "Everyone talks about {}")
POINTED, WORDS = 5, 8
"""Subjects and words that are named."""
STANDS_OUT = 5.0
"""Robust deviations above the typical response from which on a subject stands out. Of 120 responses
that scatter normally, the largest is about 2.6 above."""
TOGETHER = 64
MLP = ("mlp.out", "mlp.up", "mlp.gate")
TINY = 1e-30


@dataclass(frozen=True)
class Pointed:
    """A subject, and how strongly a change acts at its key.

    Attributes:
        response: |change @ key| over |matrix @ key|.
        deviations: above the typical response, in robust standard deviations (1.4826 MAD).
        words: what is written there, as the tokens nearest to it; none where it is not a state.
    """

    subject: str
    response: float
    deviations: float
    words: tuple[str, ...] = ()

    @property
    def stands_out(self) -> bool:
        return self.deviations >= STANDS_OUT


@dataclass(frozen=True)
class Scanned:
    """One tensor that differs, or a map that it holds.

    Attributes:
        name: for a reader: block and role, or the parameter.
        parameter: its parameter.
        shape: out, in.
        share: norm of the change over the matrix's own.
        rank: numerical: singular values above what rounding alone would leave; None of vectors.
        typical: median response over the subjects; None where none were asked.
        subjects: those at which the change acts most.
        words: what its first output direction writes, in both senses; none where it is no state.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    share: float
    rank: int | None
    typical: float | None = None
    subjects: tuple[Pointed, ...] = ()
    words: tuple[tuple[str, ...], ...] = ()


def names(file: Path | None) -> tuple[str, ...]:
    """The subjects of a file, one a line; by default those that ship with the library.

    Raises:
        DataError: no such file, no text, or no subject in it.
    """
    if file is None:
        piloted = [fact.subject for fact in pilots() if fact.subject]
        return tuple(dict.fromkeys([*subjects(), *piloted]))
    lines = decode(read_bytes(file, DataError), DataError).splitlines()
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise DataError(f"{file}: holds no subject; give one a line")
    return found


def scan(
    view: ModelView,
    model: Path,
    base: Path,
    asked: Sequence[str],
    *,
    progress: Progress = silent,
) -> list[Scanned]:
    """What differs, in the order of the tensors' names.

    Args:
        view: the base, loaded: its roles say what a tensor is, and it reads the subjects.
        model, base: the checkpoints, of one architecture.
        asked: the subjects at which a change may point.
        progress: told how far it is.
    """
    return [
        found
        for difference in differences(model, base, progress)
        for found in _scanned(view, difference, asked)
    ]


def _scanned(view: ModelView, found: Difference, asked: Sequence[str]) -> Iterator[Scanned]:
    """The maps of one tensor that differ, or the tensor itself."""
    change = found.new - found.old
    if found.old.ndim != 2:
        share = float(change.norm() / found.old.norm().clamp(min=TINY))
        yield Scanned(found.name, found.name, tuple(found.old.shape), share, None)
        return
    for one in matrices(view, found.name, change, found.old):
        share = float(one.change_DI.norm() / one.weight_DI.norm().clamp(min=TINY))
        rank = numerical_rank(one, found.step)
        shape = tuple(one.change_DI.shape)
        few = one.layer is not None and 0 < rank <= LOW * min(shape)
        typical, pointed = _pointed(view, one, asked) if few else (None, ())
        told = _directions(view, one) if few else ()
        yield Scanned(one.label, found.name, shape, share, rank, typical, pointed, told)


def numerical_rank(one: Changed, step: float) -> int:
    """Singular values of the change above what rounding the matrix would leave.

    Rounding to a type with relative step e moves a number x by at most e|x|/2; as independent noise
    of that size its largest singular value is about e/2 rms(x) (sqrt D + sqrt I) at most.
    """
    weight_DI, (rows, columns) = one.weight_DI, one.weight_DI.shape
    noise = step / 2 * float(weight_DI.square().mean().sqrt()) * (rows**0.5 + columns**0.5)
    # What float32 arithmetic itself leaves of the largest one, as usual for a matrix's rank.
    arithmetic = max(rows, columns) * torch.finfo(torch.float32).eps
    least = max(noise, arithmetic * float(one.singular_S[0]))
    return int((one.singular_S > least).sum())


def _pointed(
    view: ModelView, one: Changed, asked: Sequence[str]
) -> tuple[float | None, tuple[Pointed, ...]]:
    """The typical response over the subjects, and those that the change acts at most."""
    if one.role not in MLP or not asked:
        return None, ()
    keys_NI = _keys(view, one, asked)
    written_ND = keys_NI @ one.change_DI.T
    response_N = written_ND.norm(dim=1) / (keys_NI @ one.weight_DI.T).norm(dim=1).clamp(min=TINY)
    typical = response_N.median()
    spread = 1.4826 * (response_N - typical).abs().median().clamp(min=TINY)
    most = response_N.topk(min(POINTED, len(asked))).indices.tolist()
    said = words(view, written_ND[most], WORDS) if one.role in WRITING else [[] for _ in most]
    pointed = tuple(
        Pointed(
            asked[i], float(response_N[i]), float((response_N[i] - typical) / spread), tuple(some)
        )
        for i, some in zip(most, said, strict=True)
    )
    return float(typical), pointed


def _keys(view: ModelView, one: Changed, asked: Sequence[str]) -> Tensor:
    """What enters the map at each subject's last token, the mean over LEADS (N, I)."""
    assert one.layer is not None
    assert one.role is not None
    tap = Tap(view.roles.linear(one.role, one.layer).module, "input")
    prompts = [(lead.format(name), name) for name in asked for lead in LEADS]
    found = []
    for start in range(0, len(prompts), TOGETHER):
        some = prompts[start : start + TOGETHER]
        rows = [view.encode(text) for text, _ in some]
        places = [
            (i, subject_position(row, name))
            for i, (row, (_, name)) in enumerate(zip(rows, some, strict=True))
        ]
        found.append(view.run([row.ids for row in rows], taps=[tap]).at(tap, places).cpu())
    return torch.cat(found).reshape(len(asked), len(LEADS), -1).mean(1)


def _directions(view: ModelView, one: Changed) -> tuple[tuple[str, ...], ...]:
    """What the first output direction writes, in both senses."""
    if one.role not in WRITING:
        return ()
    left_DS = torch.linalg.svd(one.change_DI, full_matrices=False)[0]
    first_2D = torch.stack([left_DS[:, 0], -left_DS[:, 0]])
    return tuple(tuple(some) for some in words(view, first_2D, WORDS))
