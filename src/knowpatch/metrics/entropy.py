"""Entropy of texts: how varied the words of a text are, as its n-grams tell.

Zhang et al. (arXiv 1809.05972), in the weights of ROME's and KnowEdit's code: H_2 / 3 + 2 H_3 / 3
in bits. Words are split by an expression of ours, much as the Penn Treebank does ("do n't",
punctuation apart). High entropy is no quality by itself: random and long texts have most.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

FEWEST_WORDS = 3
"""Below so many words a text has no n-grams to speak of, and no entropy."""

_LETTER = r"[\w\u0300-\u036f]"  # NFKD takes accents off their letters
_WORD = re.compile(
    r"\d+(?:[.,:]\d+)+"
    rf"|{_LETTER}+(?=n't\b)|n't\b"
    r"|'(?:s|m|d|ll|re|ve)\b"
    rf"|{_LETTER}+(?:-{_LETTER}+)*"
    r"|\.{2,}|--+|[^\w\s]",
    re.IGNORECASE,
)


def split_words(text: str) -> list[str]:
    """Words and punctuation marks, in order."""
    return _WORD.findall(unicodedata.normalize("NFKD", text).replace("’", "'"))


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """H_n = - sum of f log2 f over the frequencies f of the n-grams."""
    counts = Counter(ngrams(words, n))
    total = counts.total()
    return sum(-c / total * math.log2(c / total) for c in counts.values()) + 0.0


def text_entropy(text: str) -> float | None:
    """H_2 / 3 + 2 H_3 / 3, in bits; None for a text of too few words."""
    words = split_words(text)
    if len(words) < FEWEST_WORDS:
        return None
    return ngram_entropy(words, 2) / 3 + 2 * ngram_entropy(words, 3) / 3


def distinct_share(text: str, n: int = 2) -> float | None:
    """Share of the n-grams that are distinct; None for a text of too few words."""
    words = split_words(text)
    found = ngrams(words, n)
    return len(set(found)) / len(found) if len(words) >= FEWEST_WORDS else None


def repeated_share(text: str) -> float | None:
    """Words of the longest sequence that comes twice, by all words; None for too few."""
    words = split_words(text)
    if len(words) < FEWEST_WORDS:
        return None
    longest = 0
    while len(set(found := ngrams(words, longest + 1))) < len(found):
        longest += 1
    return longest / len(words)
