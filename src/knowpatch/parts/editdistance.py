"""How alike two questions are in their letters: Levenshtein distance of what is left of them.

What is left (words.py) is lower-cased, without slots in angle brackets, punctuation and words that
every question has (MemPrompt, arXiv 2201.06009). The distance is a share of the longer of the two:
short questions are not all alike. One row of the table is computed for all stored texts at once.
Axes: N stored texts, L letters of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def letters(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The letters of texts (N, L), -1 behind their ends, and their numbers (N)."""
    lengths = [len(text) for text in texts]
    rows = [[*map(ord, text)] + [-1] * (max(lengths) - len(text)) for text in texts]
    return torch.tensor(rows), torch.tensor(lengths)


def distances(query: str, letters_NL: Tensor, lengths_N: Tensor) -> Tensor:
    """Levenshtein distances (N) of `query` and each stored text."""
    steps_L = torch.arange(letters_NL.shape[1] + 1)
    row_NL = steps_L.expand(len(letters_NL), -1)
    for letter in map(ord, query):
        replaced_NL = row_NL[:, :-1] + (letters_NL != letter)
        best_NL = torch.cat([row_NL[:, :1] + 1, torch.minimum(replaced_NL, row_NL[:, 1:] + 1)], 1)
        # Going right costs one a step: the least of what stands to the left, with the way there.
        row_NL = (best_NL - steps_L).cummin(1).values + steps_L
    return row_NL.gather(1, lengths_N[:, None])[:, 0]


def shares(query: str, letters_NL: Tensor, lengths_N: Tensor) -> Tensor:
    """Those distances, each as a share of the longer text (N)."""
    longer_N = lengths_N.clamp(min=max(len(query), 1))
    return distances(query, letters_NL, lengths_N) / longer_N
