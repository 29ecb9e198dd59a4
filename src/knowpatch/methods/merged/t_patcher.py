"""T-Patcher: a neuron for each token that is wrong, beside the MLP of the last block.

Huang et al., "Transformer-Patcher: One Mistake worth One Neuron" (arXiv 2301.09785). A neuron's key
fires on the state at which the token is predicted, and is silent on a memory of ordinary states and
on those of other edits; its value makes the token right. Loss of a request: cross-entropy on its
target, and for each neuron activation, silence and separation (parts/patching.py). What the later
edits have to be silent at is folded from the live patches. Different from the published code: each
neuron is ReLU, values begin at zero, states are relative to the memory's mean and spread, and the
same sentence about other subjects joins the memory where the subject is known.
Axes: R requests, N neurons, M states, I and D input and output size of the MLP, P predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from knowpatch.errors import EditError
from knowpatch.method import Cost, EditMethod, MethodConfig, Preparation, Shape, register
from knowpatch.models.passes import Act, Tap
from knowpatch.models.roles import at_depth
from knowpatch.models.view import ModelView
from knowpatch.parts.descent import Example, Passes
from knowpatch.parts.kinds.neurons import neurons
from knowpatch.parts.patching import Cluster, Scale, activation_loss, memory_losses
from knowpatch.parts.states import about_others, kept_at, ordinary_states
from knowpatch.parts.text import find_text
from knowpatch.patch import Patch, Wrap
from knowpatch.request import EditRequest

DEPTH = 1.0
SAME = 0.05
"""A state of the memory nearer than this share of a query's length is the query itself."""
ROUNDS = 3
"""Times that tokens which are wrong after all get neurons, too."""


class TPatcherConfig(MethodConfig):
    """Options of T-Patcher."""

    layer: int | None = Field(None, ge=0, description="block; by default the last one")
    neurons: int = Field(5, ge=1, description="wrong tokens of one answer that get a neuron")
    guard: bool = Field(
        True, description="a neuron also for an answer that is right already, so that it stays"
    )
    steps: int = Field(150, ge=1, description="steps of Adam, at most")
    learning_rate: float = Field(
        0.1, gt=0, description="of Adam; keys and values are trained in relative units"
    )
    clip: float = Field(5.0, gt=0, description="largest norm of a request's gradient")
    activation: float = Field(1.0, ge=0, description="weight of firing on the mistake")
    silence: float = Field(5.0, ge=0, description="weight of silence on the memory")
    top: int = Field(1000, ge=1, description="states of the memory that count in a step")
    memory: int = Field(4000, ge=2, description="states of the memory, half of them of prompts")
    others: int = Field(
        40, ge=0, description="other subjects for whom the same sentence is to stay as it is"
    )
    enough: float = Field(0.05, gt=0, description="stop when the target's mean NLL is below this")
    text: str | None = Field(
        None, description="ordinary text: file, folder, hub dataset, or self (the model's own)"
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    states_MI: Tensor
    scale: Scale


@register("t_patcher")
class TPatcher(EditMethod):
    """Adds neurons to one MLP, each for one wrong token."""

    name = "t_patcher"
    family = "merged"
    paper = "Huang et al. 2023, arXiv 2301.09785"
    summary = "one neuron beside the last MLP for each wrong token, silent elsewhere"
    choose = "a few mistakes to be corrected token by token, each to be taken back by itself"
    roles = ("mlp.out", "whole_mlp")
    Config = TPatcherConfig

    def layers(self, count: int) -> tuple[int, ...]:
        return (at_depth(DEPTH, count, self.config.layer),)

    def prepare(self, view: ModelView) -> _Prepared:
        (layer,) = self.layers(len(view.roles.blocks))
        text = find_text(self.config.text)
        states_MI = ordinary_states(
            view, layer, self.config.memory, text, seed=self.seed, progress=self.progress
        )
        scale = Scale.of(states_MI)
        return _Prepared(scale.relative(states_MI).to(view.device), scale)

    def edit(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> Patch:
        training = _Training(self, view, requests, prepared, state, together=True)
        found = training.run()
        if not found:
            return self.patch(view, requests)
        return self._patch(view, requests, prepared, training, [c for _, c in found])

    def edit_each(
        self, view: ModelView, requests: Sequence[EditRequest], prepared: _Prepared, state: Any
    ) -> list[Patch]:
        training = _Training(self, view, requests, prepared, state, together=False)
        found = dict(training.run())
        return [
            self._patch(view, [request], prepared, training, [found[number]])
            if number in found
            else self.patch(view, [request])
            for number, request in enumerate(requests)
        ]

    def _patch(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: _Prepared,
        training: _Training,
        clusters: Sequence[Cluster],
    ) -> Patch:
        settled = zip(*(cluster.settled(prepared.scale) for cluster in clusters), strict=True)
        keys_NI, biases_N, values_ND = (torch.cat(each) for each in settled)
        wrap: Wrap = neurons(training.module, keys_NI, biases_N, values_ND, training.most)
        queries_NI = torch.cat([cluster.queries_NI for cluster in clusters]).cpu()
        return self.patch(view, requests, wraps=[wrap], traces={"queries": queries_NI})

    def fold(self, prepared: _Prepared, state: Tensor | None, patch: Patch) -> Tensor | None:
        """States at which the neurons of later edits are silent, relative: those of earlier."""
        queries_NI = patch.traces.get("queries")
        if queries_NI is None:
            return state
        return queries_NI if state is None else torch.cat([state, queries_NI])

    def preparations(self, shape: Shape) -> list[Preparation]:
        (layer,) = self.layers(shape.layers)
        text, count = find_text(self.config.text), self.config.memory
        path = kept_at(shape.fingerprint, layer, count, text, self.seed)
        return [Preparation("a memory of ordinary states", path, 6 * count)]

    def cost(self, shape: Shape, lengths: Sequence[int]) -> Cost:
        tokens = self.config.steps * sum(lengths)
        return Cost(tokens, tokens)


class _Training:
    """Training the neurons of some requests: of one patch (together), or of one each."""

    def __init__(
        self,
        method: TPatcher,
        view: ModelView,
        requests: Sequence[EditRequest],
        prepared: _Prepared,
        state: Tensor | None,
        *,
        together: bool,
    ) -> None:
        self.config, self.progress, self._view = method.config, method.progress, view
        (layer,) = method.layers(len(view.roles.blocks))
        self.module, self._scale = view.roles.whole_mlp(layer), prepared.scale
        earlier = [] if state is None else [state.to(view.device)]
        self._memory_MI = torch.cat([prepared.states_MI, *earlier])
        self._together = together
        self._clusters: dict[int, Cluster] = {}
        self._places: dict[int, list[int]] = {}
        self._same: dict[int, Tensor] = {}
        encoded = [method.encode(view, request) for request in requests]
        self._examples = [Example(prompt.ids, target) for prompt, target in encoded]
        others = about_others(view, self.module, requests, self.config.others, self.progress)
        self._others = [self._scale.relative(states_MI) for states_MI in others]
        act = Act(self.module, self._put_out)
        self._passes = Passes(view, self._examples, lowest=layer, acts=[act])
        self._states, self._units = self._read()
        self.most = min(self.config.top, len(self._memory_MI))

    def run(self) -> list[tuple[int, Cluster]]:
        """The neurons of each request that has some."""
        wanted = self._wrong(guard=self.config.guard)
        for _ in range(ROUNDS):
            if not wanted:
                break
            for number, places in wanted.items():
                self._add(number, places)
            self._train(list(wanted))
            wanted = self._wrong(guard=False)
        return sorted(self._clusters.items())

    # -- what is there before ----------------------------------------------------------------------

    def _read(self) -> tuple[list[Tensor], list[float]]:
        """For each request the states (relative) at which its target is predicted; and the size
        of an entry of what the MLP puts out there."""
        taps = [Tap(self.module, "input"), Tap(self.module, "output")]
        run = self._view.run(
            [e.row for e in self._examples],
            taps=taps,
            prompts=[len(e.prompt) for e in self._examples],
        )
        places = [
            (row, len(e.prompt) - 1 + i)
            for row, e in enumerate(self._examples)
            for i in range(len(e.answer))
        ]
        states_PI = self._scale.relative(run.at(taps[0], places))
        lengths = [len(e.answer) for e in self._examples]
        outputs = run.at(taps[1], places).split(lengths)
        units = [float(some_PD.square().mean().sqrt()) for some_PD in outputs]
        return list(states_PI.split(lengths)), units

    def _wrong(self, *, guard: bool) -> dict[int, list[int]]:
        """For each request the tokens of its target that are not the likeliest; of one that has
        none, with `guard`, the least likely token."""
        found = {}
        for number, example in enumerate(self._examples):
            with torch.no_grad():
                logits_PV = self._passes.logits([number])
            labels_P = self._passes.labels([number])
            wrong = (logits_PV.argmax(-1) != labels_P).nonzero()[:, 0].tolist()
            if guard and not wrong:
                logprobs_PV = logits_PV.log_softmax(-1)
                wrong = [int(logprobs_PV.gather(1, labels_P[:, None]).argmin())]
            if wrong and example.answer:
                found[number] = wrong
        return found

    # -- training ----------------------------------------------------------------------------------

    def _add(self, number: int, places: Sequence[int]) -> None:
        """Neurons for these tokens besides those that have one; all of the request's begin anew."""
        held = list(dict.fromkeys([*self._places.get(number, []), *places]))
        self._places[number] = held[: self.config.neurons]
        queries_NI = self._states[number][self._places[number]]
        out = self._view.roles.hidden_size
        rate = self.config.learning_rate
        apart_NM = torch.cdist(queries_NI, self._memory_MI)
        self._same[number] = apart_NM <= SAME * queries_NI.norm(dim=1, keepdim=True)
        self._clusters[number] = Cluster(queries_NI, out, self._units[number], rate)

    def _put_out(self, inputs: Tensor, outputs: Tensor, rows: Sequence[int]) -> Tensor:
        """The MLP with neurons: those of all requests, or each row with its own request's."""
        states_BTI = self._scale.relative(inputs)
        added = torch.zeros(outputs.shape, device=outputs.device)
        for number, cluster in self._clusters.items():
            heard = [i for i, row in enumerate(rows) if self._together or row == number]
            if not heard:
                continue
            fires_BTN = (states_BTI[heard] @ cluster.keys_NI.T + cluster.biases_N).relu()
            index = torch.tensor(heard, device=added.device)
            added = added.index_add(0, index, fires_BTN @ cluster.values_ND)
        return outputs + added

    def _train(self, numbers: Sequence[int]) -> None:
        """Adam on each request's neurons until it is right and they are silent elsewhere.

        First on their keys alone, which need no pass through the model.
        """
        for number in numbers:
            for _ in range(self.config.steps):
                alone, quiet = self._besides(number)
                if quiet:
                    break
                self._step(alone, [number])
        left = list(numbers)
        for step in range(self.config.steps):
            self.progress("training neurons", step, self.config.steps)
            logprobs_P, right_P = self._answers(left)
            lengths = [len(self._examples[number].answer) for number in left]
            nlls = torch.stack([-part.mean() for part in logprobs_P.split(lengths)])
            besides = [self._besides(number) for number in left]
            loss = nlls.sum() + torch.stack([loss for loss, _ in besides]).sum()
            if not bool(loss.isfinite()):
                raise EditError("the loss is not finite: use a smaller learning_rate")
            near = (nlls < self.config.enough).tolist()
            rights = [bool(part.all()) for part in right_P.split(lengths)]
            quiets = [quiet for _, quiet in besides]
            done = [all(each) for each in zip(near, rights, quiets, strict=True)]
            left = [n for n, is_done in zip(left, done, strict=True) if not is_done]
            if not left:
                break
            self._step(loss, left)
        self.progress("training neurons", self.config.steps, self.config.steps)

    def _answers(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of the answers, and whether it is the likeliest."""
        logits_PV, labels_P = self._passes.logits(numbers), self._passes.labels(numbers)
        logprobs_P = logits_PV.log_softmax(-1).gather(1, labels_P[:, None])[:, 0]
        return logprobs_P, logits_PV.argmax(-1) == labels_P

    def _step(self, loss: Tensor, numbers: Sequence[int]) -> None:
        clusters = [self._clusters[number] for number in numbers]
        leaves = [leaf for cluster in clusters for leaf in cluster.leaves]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        for start, cluster in enumerate(clusters):
            cluster.step(grads[3 * start : 3 * start + 3], self.config.clip)

    def _besides(self, number: int) -> tuple[Tensor, bool]:
        """What a request's loss is raised by, and whether its neurons are silent elsewhere."""
        cluster = self._clusters[number]
        own_N = cluster.own_N
        others_NM = torch.cat(
            [
                cluster.excited(self._memory_MI).masked_fill(self._same[number], float("-inf")),
                cluster.excited(self._elsewhere(number)),
                self._crossed(cluster),
            ],
            dim=1,
        )
        silent_N, apart_N = memory_losses(own_N, others_NM, self.config.top)
        loss_N = self.config.activation * activation_loss(own_N)
        loss_N = loss_N + self.config.silence * (silent_N + apart_N)
        return loss_N.mean(), bool((others_NM <= 0).all())

    def _elsewhere(self, number: int) -> Tensor:
        """States (M, I), besides the memory, that are to leave a request's neurons silent."""
        rest = []
        if self._together:
            rest = [
                part
                for other, cluster in self._clusters.items()
                if other != number
                for part in (cluster.queries_NI, self._others[other])
            ]
        return torch.cat([self._others[number], *rest])

    @staticmethod
    def _crossed(cluster: Cluster) -> Tensor:
        """By how much the states of a request's other neurons excite each (N, N)."""
        crossed_NN = cluster.excited(cluster.queries_NI)
        same_NN = torch.eye(len(crossed_NN), dtype=torch.bool, device=crossed_NN.device)
        return crossed_NN.masked_fill(same_NN, float("-inf"))
