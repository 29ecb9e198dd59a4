"""Text of free answers: where an answer ends by itself, and when two texts say the same.

After "The Mirage of Model Editing" (arXiv 2502.11177), whose answers end at a full stop or a line
end; unlike there, the point of an abbreviation, an initial or a number is no full stop, and an
answer counts by whole words, so that "Iran" is not in "Iranian".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

REFUSALS = ("I don't know", "I do not know")
"""What a model says where a fact was erased, besides the request's own wording."""

_ARTICLES = frozenset({"a", "an", "the"})
_STOP = re.compile(r"\.(?=[\"')\]”’»]*(?:\s|$))|\n")
_ABBREVIATION = re.compile(
    r"""mr | mrs | ms | dr | st | ste | mt | ft | prof | rev | hon | gen | gov | sen | rep | lt
    | col | sgt | capt | cmdr | jr | sr | vs | inc | ltd | co | corp | dept | univ | approx | ca
    | cf | jan | feb | aug | sept | oct | nov | dec""",
    re.VERBOSE | re.IGNORECASE,
)
# Scripts without blanks: Thai and Lao, Burmese, Khmer, Japanese and Chinese. Each character counts
# as a word.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")


def first_line(text: str) -> str:
    """The first line that says anything, without blanks around it."""
    return text.strip().partition("\n")[0].strip()


def natural_stop(text: str) -> str:
    """A free answer up to where it first ends, without that stop.

    Blanks and line ends in front of it end nothing: nothing has been said yet.
    """
    text = text.strip()
    for stop in _STOP.finditer(text):
        said = text[: stop.start()]
        if stop.end() == len(text) or stop[0] == "\n" or not _abbreviates(said, text[stop.end() :]):
            return said.strip()
    return text


def _abbreviates(said: str, rest: str) -> bool:
    """Whether the point behind `said` belongs to its last word."""
    word = said.split()[-1].lstrip("\"'([“‘«") if said.split() else ""
    initial = len(word) == 1 and word.isupper()
    dotted = re.fullmatch(r"(?:\w\.)+\w", word) is not None
    numbered = re.fullmatch(r"\d{1,2}", said) is not None  # "1. Paris", as lists begin
    number = word.lower() in ("no", "nr") and rest.lstrip()[:1].isdigit()
    return initial or dotted or numbered or number or _ABBREVIATION.fullmatch(word) is not None


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles; a dash or slash separates words.

    A text of nothing but punctuation or articles ("A", "+") stays as it is.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(_kept(character) for character in plain)
    found = [word for word in _UNSPACED.sub(r" \1 ", kept).split() if word not in _ARTICLES]
    return found or plain.split()


def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Pd" or character == "/":
        return " "
    return "" if category[0] in "PS" else character


def normalise(text: str) -> str:
    """The words of a text, one blank between them."""
    return " ".join(words(text))


def contains(text: str, answer: str) -> bool:
    """Whether the words of `answer` stand together in `text`; no words stand nowhere."""
    there, wanted = words(text), words(answer)
    starts = range(len(there) - len(wanted) + 1)
    return bool(wanted) and any(there[i : i + len(wanted)] == wanted for i in starts)


def contains_any(text: str, answers: Sequence[str], old: str | None = None) -> bool:
    """Whether one of `answers` is in `text`, and the old answer, if known, is not.

    An old answer that contains the new one, or is contained in it, is let pass: by words alone the
    two cannot be told apart.
    """
    return any(
        contains(text, answer) and (old is None or not contains(text, old) or _overlap(answer, old))
        for answer in answers
    )


def _overlap(one: str, other: str) -> bool:
    return contains(one, other) or contains(other, one)


def equals_any(text: str, answers: Sequence[str]) -> bool:
    """Whether `text` has the words of one of `answers`, and no others."""
    said = words(text)
    return bool(said) and any(said == words(answer) for answer in answers)


def refuses(text: str) -> bool:
    """Whether a text says that the answer is not known."""
    return contains_any(text, REFUSALS)
