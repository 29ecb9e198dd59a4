"""Reading what a person gave: a file's bytes, UTF-8 text, JSON; what cannot be read is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knowpatch.errors import InputError

Refusal = type[InputError]
"""What is raised: the class that says what was being read."""


def read_bytes(path: Path, refusal: Refusal) -> bytes:
    """A file's content; a message with the path if there is none to be had."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise refusal(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        reason = getattr(error, "strerror", None) or error
        raise refusal(f"{path}: cannot be read ({reason})") from None


def decode(content: bytes, refusal: Refusal) -> str:
    """UTF-8 text, with or without a byte order mark; a message with the first bad byte if not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refusal(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def parse(text: str, refusal: Refusal, *, line: int | None = None) -> Any:
    """Parsed JSON; a message with the line (or the given one) if it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise refusal(f"line {line or 1}: not JSON (nested too deeply)") from None
    except ValueError as error:
        at = line or getattr(error, "lineno", 1)
        reason = getattr(error, "msg", None) or str(error).split(";")[0]
        raise refusal(f"line {at}: not JSON ({reason})") from None
