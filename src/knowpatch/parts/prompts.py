"""A prompt as token ids: as it is, or as the user's turn of a chat."""

from __future__ import annotations

from typing import Any

from knowpatch.parts.spans import Encoded, encode

PLACE = "\ue000"
"""A character for private use, which no template and no prompt holds."""


def encode_prompt(
    tokenizer: Any, prompt: str, *, chat: bool, before: str, system: str | None
) -> Encoded:
    """A prompt as ids: as it is (without blanks at its end), or framed by the chat template.

    Raises:
        jinja2.TemplateError: the template refuses.
    """
    prompt = prompt.strip() if chat else prompt.rstrip(" ")
    if not chat:
        return encode(tokenizer, before + prompt, content=len(before))
    text = _framed(tokenizer, before + prompt, system)
    # The frame is rendered around a mark as well: the prompt's words may stand in it, too.
    mark = _framed(tokenizer, PLACE, system).find(PLACE) + len(before)
    content = mark if text.startswith(prompt, mark) else max(text.rfind(prompt), 0)
    return encode(tokenizer, text, special=False, content=content)


def _framed(tokenizer: Any, words: str, system: str | None) -> str:
    turns = [{"role": "user", "content": words}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text
