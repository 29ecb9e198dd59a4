"""What several tests make by hand, and what they hold against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from knowpatch.models.fingerprint import tensor_digest
from knowpatch.parts.tuned import Trial, passes_over
from knowpatch.patch import Provenance


def provenance(model, request, *, seed=0, fingerprint=None):
    """The provenance of a patch that no method made."""
    return Provenance(
        method="by hand",
        config={},
        seed=seed,
        requests=(request,),
        version="0",
        fingerprint=fingerprint or model.view.fingerprint,
    )


def state(model):
    """Everything that an edit, or a session, must leave as it found it."""
    module = model.model
    return {
        "weights": {n: tensor_digest(p) for n, p in module.named_parameters()},
        "buffers": {n: tensor_digest(b) for n, b in module.named_buffers()},
        "grad": {n: (p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        "training": {n: m.training for n, m in module.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in module.named_modules()
        },
        "random": torch.get_rng_state().tolist(),
    }


def tuned_loss(model: Any, method: Any, requests: Sequence[Any]) -> tuple[float, list[Any]]:
    """The loss that a fine-tuning method lowers, at its start, and the examples it is over."""
    examples = [e for r in requests for e in method.examples(model.view, r)]
    role = method.trained(model.view, requests)[0]
    passes = passes_over(
        model.view, [Trial(role, method.change(model.view, role, None, None))], examples
    )
    return float(method.loss(passes, range(len(examples))).detach()), examples
