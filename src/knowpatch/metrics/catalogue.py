"""Catalogue: all metrics by name, and those that are chosen by names, groups or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

from knowpatch.errors import OptionError, did_you_mean
from knowpatch.metrics.metric import METRICS, Metric

ALL = "all"
ORDER = (
    "accuracy",
    "generation",
    "judge",
    "comparison",
    "locality",
    "multihop",
    "negation",
    "belief",
    "sentiment",
    "refusal",
    "perplexity",
    "general",
    "fluency",
)
"""Groups in the order in which they are shown; others follow by name."""
STANDARD = (
    "accuracy",
    "success_gen_exact",
    "success_gen_contains",
    "rephrase_gen_contains",
    "portability_gen_contains",
    "comparison",
    "locality",
    "multihop",
    "sentiment",
    "refusal",
    "perplexity_tf",
    "fluency_entropy_gen",
)
"""What is measured where nothing is chosen."""


def groups() -> dict[str, tuple[Metric, ...]]:
    """The metrics of each group, in a fixed order."""
    names = METRICS.names()
    known = [name for name in ORDER if name in names]
    ordered = [*known, *(name for name in names if name not in known)]
    return {name: tuple(METRICS.get(name)) for name in ordered}


def catalogue() -> dict[str, Metric]:
    """All metrics by name, in a fixed order.

    Raises:
        OptionError: two metrics, or a metric and a group, of one name.
    """
    grouped = groups()
    found: dict[str, Metric] = {}
    for group, metrics in grouped.items():
        for metric in metrics:
            if metric.name in found or metric.name in grouped or metric.name == ALL:
                raise OptionError(
                    f"the group of metrics {group!r} has a metric {metric.name!r}, a name that is "
                    "taken: rename its function"
                )
            found[metric.name] = metric
    return found


def chosen(names: Sequence[str] | None) -> tuple[Metric, ...]:
    """The metrics of these names or groups, each once, in the order of the catalogue.

    Args:
        names: of metrics or groups, or "all"; None for the standard ones.

    Raises:
        OptionError: an unknown name.
    """
    known, grouped = catalogue(), groups()
    wanted: set[str] = set()
    for name in STANDARD if names is None else names:
        if name == ALL:
            wanted |= set(known)
        elif name in grouped:
            wanted |= {metric.name for metric in grouped[name]}
        elif name in known:
            wanted.add(name)
        else:
            allowed = [ALL, *grouped, *known]
            raise OptionError(f"unknown metric {name!r}: {did_you_mean(name, allowed)}")
    return tuple(metric for name, metric in known.items() if name in wanted)
