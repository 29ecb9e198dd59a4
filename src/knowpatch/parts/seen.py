"""What lifelong normalisation has seen of maps: a value that is folded from what each turn adds.

Means and sums of squared deviations are merged by Chan's formula, which knows no order: a patch
carries what its own turn adds, and a turn that is dropped was never seen.
Axes: T rows, I and O width of a map's input and output, R rows of a root, F either width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from knowpatch.parts.solve import Factors, Form, update

LEAST_SIGMA = 1e-6
"""No coordinate's deviation counts as smaller than this share of the median one."""


@dataclass(frozen=True, eq=False)
class Running:
    """Of rows that were seen: how many, their mean, and sums of squared deviations, float64.

    Attributes:
        scatter_FF: sums of products of deviations, where they are kept.
    """

    count: int
    mean_F: Tensor
    square_F: Tensor
    scatter_FF: Tensor | None = None

    @classmethod
    def of(cls, rows_TF: Tensor) -> Running:
        mean_F = rows_TF.double().mean(0)
        return cls(len(rows_TF), mean_F, (rows_TF.double() - mean_F).square().sum(0))

    def merged(self, other: Running) -> Running:
        """Of the rows of both (Chan's formula)."""
        count = self.count + other.count
        apart_F = other.mean_F - self.mean_F
        weight = self.count * other.count / count
        scatter_FF = None
        if self.scatter_FF is not None and other.scatter_FF is not None:
            scatter_FF = self.scatter_FF + other.scatter_FF
            scatter_FF = scatter_FF + weight * torch.outer(apart_F, apart_F)
        return Running(
            count,
            self.mean_F + apart_F * (other.count / count),
            self.square_F + other.square_F + weight * apart_F.square(),
            scatter_FF,
        )

    @property
    def sigma_F(self) -> Tensor:
        """Standard deviations (biased: a single row has one, 0), none of them nothing."""
        sigma_F = (self.square_F / self.count).sqrt()
        least = LEAST_SIGMA * float(sigma_F.median())
        return sigma_F.clamp(min=max(least, torch.finfo(torch.float32).tiny))

    @property
    def energy(self) -> float:
        """The mean squared length of a row."""
        return float(self.square_F.sum() / self.count + self.mean_F.square().sum())


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen at one map: its inputs, and gradients at its output."""

    inputs: Running
    gradients: Running

    def merged(self, other: Seen) -> Seen:
        return Seen(self.inputs.merged(other.inputs), self.gradients.merged(other.gradients))


State = Mapping[str, Seen]
"""By map."""


def merged(state: State, turn: State) -> State:
    """The state after one more turn."""
    both = {name: state[name].merged(seen) for name, seen in turn.items() if name in state}
    return {**state, **turn, **both}


def traces_of(name: str, inputs_TI: Tensor, gradients_TO: Tensor, root: bool) -> dict[str, Tensor]:
    """What a turn adds at one map, as a patch carries it (float32).

    Args:
        root: with a factor R of the gradients' scatter R^T R, of at most O rows.
    """
    inputs, gradients = Running.of(inputs_TI), Running.of(gradients_TO)
    found = {
        f"count.{name}": torch.tensor([float(inputs.count)]),
        f"inputs.{name}": torch.stack([inputs.mean_F, inputs.square_F]),
        f"gradients.{name}": torch.stack([gradients.mean_F, gradients.square_F]),
    }
    if root:
        found[f"root.{name}"] = torch.linalg.qr(gradients_TO.double() - gradients.mean_F).R
    return {key: tensor.float().contiguous() for key, tensor in found.items()}


def seen_in(traces: Mapping[str, Tensor]) -> State:
    """What the traces of a turn say, by map."""
    found = {}
    for key in traces:
        kind, _, name = key.partition(".")
        if kind != "count":
            continue
        count = int(traces[key])
        inputs_2I, gradients_2O = traces[f"inputs.{name}"], traces[f"gradients.{name}"]
        scatter_OO = None
        if (root_RO := traces.get(f"root.{name}")) is not None:
            scatter_OO = root_RO.double().T @ root_RO.double()
        found[name] = Seen(
            Running(count, inputs_2I[0].double(), inputs_2I[1].double()),
            Running(count, gradients_2O[0].double(), gradients_2O[1].double(), scatter_OO),
        )
    return found


@dataclass(frozen=True, eq=False)
class Scale:
    """How gradients are brought to one scale: divided (O), or multiplied by a matrix (O, O).

    Attributes:
        size: the mean of g times g^, to be expected of gradients like those that were seen.
    """

    mean_O: Tensor
    by: Tensor
    size: float

    @classmethod
    def diagonal(cls, gradients: Running) -> Scale:
        sigma_O = gradients.sigma_F
        return cls(gradients.mean_F, 1 / sigma_O, float(sigma_O.sum()))

    def __call__(self, gradients_TO: Tensor) -> Tensor:
        apart_TO = gradients_TO.double() - self.mean_O
        return apart_TO * self.by if self.by.ndim == 1 else apart_TO @ self.by


def standardised(rows_TF: Tensor, seen: Running) -> Tensor:
    """Rows less their mean, each coordinate in its deviations."""
    return (rows_TF.double() - seen.mean_F) / seen.sigma_F


@dataclass(frozen=True, eq=False)
class Step:
    """What one round takes of a map: its scale of gradients, alpha, and eta."""

    inputs: Running
    scale: Scale
    alpha: float
    eta: float

    def values(self, inputs_TI: Tensor, gradients_TO: Tensor) -> Tensor:
        """What the map is to add at these inputs (T, O)."""
        sizes_T = standardised(inputs_TI, self.inputs).square().sum(1)
        return -self.eta * sizes_T[:, None] * self.scale(gradients_TO)

    def factors(self, inputs_TI: Tensor, values_TO: Tensor) -> Factors:
        """The change of the map, in factors (O, .) and (., I)."""
        form = Form.even(1.0, inputs_TI.shape[1])
        return update(values_TO.T, inputs_TI.T, form, slack=self.alpha)
