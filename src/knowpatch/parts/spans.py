"""Where subject and target sit among the tokens.

Positions come from the tokenizer's character offsets on the whole string, never from adding up the
lengths of pieces: a merge may cross a border, and a tokenizer may put a token in front. Prompt and
target are joined at the id level, so that no token of the prompt changes when a target follows.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from knowpatch.errors import ModelError, RequestError

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """A text as token ids, with the characters (start, end) that each token covers.

    `content` is where the user's own words begin in `text` (behind a chat template's frame).
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    content: int = 0


def encode(tokenizer: Any, text: str, *, special: bool = True, content: int = 0) -> Encoded:
    """Tokenise `text`, with the tokenizer's own leading tokens if `special`, none behind."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets; use the model's fast "
            "tokenizer (a tokenizer.json)"
        )
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]
    while (
        ids
        and special
        and offsets[-1][0] == offsets[-1][1]
        and ids[-1] in tokenizer.all_special_ids
    ):
        if len(ids) == 1:
            break
        ids.pop()
        offsets.pop()
    return Encoded(text, tuple(ids), tuple(offsets), content)


def subject_span(text: str, subject: str, start: int = 0, *, last: bool = False) -> Span:
    """Characters of the first (or `last`) occurrence of `subject` in `text` from `start` on.

    An occurrence that is not part of a longer word comes before one that is ("Ann" in "Anna and
    Ann"); scripts without spaces have only the second kind.
    """
    found = subject_spans(text, subject, start)
    if not found:
        raise RequestError(f"subject {subject!r} is not in the prompt {text[start:]!r}")
    return found[-1 if last else 0]


def subject_spans(text: str, subject: str, start: int = 0) -> list[Span]:
    """All occurrences; those within longer words only where there are no others."""
    found = [match.span() for match in re.compile(re.escape(subject)).finditer(text, start)]
    return [span for span in found if not in_word(text, span)] or found


def in_word(text: str, span: Span) -> bool:
    """Whether a span is part of a longer word: a letter, digit or combining mark goes on."""
    around = text[max(span[0] - 1, 0) : span[0]], text[span[1] : span[1] + 1]
    return any(c == "_" or unicodedata.category(c)[0] in "LNM" for c in around if c)


def tokens_of(encoded: Encoded, span: Span) -> list[int]:
    """Indices of the tokens that cover any character of `span`; at least one."""
    start, end = span
    covering = [
        i for i, (begin, stop) in enumerate(encoded.offsets) if begin < end and stop > start
    ]
    if not covering:
        raise RequestError(f"no token covers {encoded.text[start:end]!r} in {encoded.text!r}")
    return covering


def subject_position(encoded: Encoded, subject: str) -> int:
    """Index of the last token of the subject, in the user's own words."""
    return tokens_of(encoded, subject_span(encoded.text, subject, encoded.content))[-1]


def separator(text: str, target: str) -> str:
    """What stands between a prompt and its answer: a space, unless the script or text has none."""
    if not text or text[-1].isspace() or target[:1].isspace():
        return ""
    if _unspaced(text[-1]) or _unspaced(target[:1]) or target[:1] in ".,;:!?)]}":
        return ""
    return " "


def _unspaced(character: str) -> bool:
    """Whether a character belongs to a script written without spaces between words."""
    name = unicodedata.name(character, "") if character else ""
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def continuation(tokenizer: Any, encoded: Encoded, target: str) -> tuple[int, ...]:
    """Ids of `target` as the answer to `encoded`, to be put behind its ids.

    A tokenizer may treat the start of a text specially (SentencePiece puts a space there), so of
    the ways to encode the answer alone the first is taken that reads as prompt and answer joined.
    """
    joined = separator(encoded.text, target) + target
    alone = _plain_ids(tokenizer, joined)
    line = _plain_ids(tokenizer, "\n")
    behind = _plain_ids(tokenizer, f"\n{joined}")
    ways = [alone, alone[1:], _plain_ids(tokenizer, joined.lstrip(" "))]
    ways += [behind[len(line) :]] if behind[: len(line)] == line else []
    prompt = _text(tokenizer, encoded.ids)
    for ids in ways:
        if ids and _text(tokenizer, (*encoded.ids, *ids)) == prompt + joined:
            return tuple(ids)
    # Tokenizers that normalise text (lower-casing, accents) never read back what was given.
    return tuple(alone)


def forms(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    """Ids of a text behind a space, and as it begins a line; each way once."""
    line = _plain_ids(tokenizer, "\n")
    behind = _plain_ids(tokenizer, f"\n{text}")
    ways = [_plain_ids(tokenizer, f" {text}"), _plain_ids(tokenizer, text)]
    ways += [behind[len(line) :]] if behind[: len(line)] == line else []
    return tuple(dict.fromkeys(tuple(ids) for ids in ways if ids))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)
