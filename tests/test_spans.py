"""Subjects and targets among the tokens: parts/spans.py over three kinds of tokenizer.

The reference never looks at character offsets: the subject's last token is the first one with which
the ids, read from the left, say the text up to the subject's end.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from knowpatch.errors import ModelError, RequestError
from knowpatch.models.load import wrap
from knowpatch.models.view import ModelView
from knowpatch.parts.spans import (
    Encoded,
    continuation,
    encode,
    separator,
    subject_position,
    subject_span,
    tokens_of,
)

KINDS = ("bpe", "sentencepiece", "bytes")
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)

# text, subject, where the wanted occurrence of the subject begins
SUBJECTS = [
    pytest.param("The capital of France is", "France", 15, id="inside"),
    pytest.param("Paris is the capital of France", "Paris", 0, id="starts-the-prompt"),
    pytest.param("The capital is Paris", "Paris", 15, id="ends-the-prompt"),
    pytest.param("France borders Italy, and Italy borders France", "France", 0, id="twice"),
    pytest.param("Italy, and Italy again", "Italy", 0, id="twice-before-a-comma"),
    pytest.param("Anna met Ann in Rome", "Ann", 9, id="shares-a-prefix"),
    pytest.param("Joanna saw Anna and Ann", "Ann", 20, id="inside-two-longer-words"),
    pytest.param("The capital of France is", "Fran", 15, id="ends-inside-a-merge"),
    pytest.param("The capital of Japan", "capit", 4, id="ends-inside-a-whole-word-token"),
    pytest.param("The Nile flows through Egypt", "The Nile", 0, id="two-words"),
    pytest.param(" Rome is old", "Rome", 1, id="behind-a-leading-space"),
    pytest.param(" Rome is old", " Rome", 0, id="with-its-leading-space"),
    pytest.param("Is C++ older than C?", "C++", 3, id="not-a-word"),
    pytest.param("Is C++ older than C?", "C", 3, id="before-punctuation"),
    pytest.param("Rome\nis old, Rome is", "Rome", 0, id="before-a-newline"),
    pytest.param("中国的首都是北京吗", "北京", 6, id="chinese"),
    pytest.param("北京是中国的首都，北京很大", "北京", 0, id="chinese-twice"),
    pytest.param("Столица Франции это Париж", "Франции", 8, id="cyrillic"),
    pytest.param("Анна и Анн в Москве", "Анн", 7, id="cyrillic-prefix"),
    pytest.param("عاصمة فرنسا هي باريس", "فرنسا", 6, id="arabic"),
    pytest.param("भारत की राजधानी दिल्ली है", "राजधानी", 8, id="hindi"),
    pytest.param("I like 😀 a lot", "😀", 7, id="emoji"),
    pytest.param("👩‍🚀 flew to the Moon", "👩‍🚀", 0, id="emoji-of-three-characters"),
    pytest.param("The café is in Lyon", "café", 4, id="accent"),
]

JOINED = [
    pytest.param("The capital of France is", "Paris", id="words"),
    pytest.param("The capital of France is", "Rome, the old one", id="several-words"),
    pytest.param("The capital of France is", " Paris", id="target-with-its-space"),
    pytest.param("The Nile flows through Egypt", ", and Sudan", id="punctuation"),
    pytest.param("The capital of Fran", "ce and Italy", id="across-a-merge"),
    pytest.param(" Rome is", "old", id="leading-space"),
    pytest.param("北京是", "中国的首都", id="chinese"),
    pytest.param("The capital of China is", "北京", id="latin-then-chinese"),
    pytest.param("Столица Франции это", "Париж", id="cyrillic"),
    pytest.param("عاصمة فرنسا هي", "باريس", id="arabic"),
    pytest.param("भारत की राजधानी", "दिल्ली है", id="hindi"),
    pytest.param("I like", "😀", id="emoji"),
    pytest.param("Two plus two equals", "4", id="number"),
]

UNSPACED = [
    pytest.param("北京是", "Paris", id="chinese-then-latin"),
    pytest.param("The capital of France is\n", "Paris", id="newline"),
    pytest.param("Q: the capital of France\nA:\t", "Paris", id="tab"),
]


def read(tokenizer: Any, ids: tuple[int, ...], text: str) -> str:
    """What `ids` say, without BOS and the space that SentencePiece puts in front."""
    said = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    said = said if text.startswith("<s>") else said.removeprefix("<s>")
    return said[1:] if said.startswith(" ") and not text.startswith(" ") else said


def last_by_reading(tokenizer: Any, encoded: Encoded, end: int) -> int:
    """The plain reference: the first token with which the ids say the text up to `end`."""
    text = encoded.text
    reads = (read(tokenizer, encoded.ids[: i + 1], text) for i in range(len(encoded.ids)))
    return next(i for i, said in enumerate(reads) if said.startswith(text[:end]))


def with_end(kind: str) -> Any:
    """A tokenizer that also puts an end token behind every text."""
    tok = copy.deepcopy(tiny.tokenizer(kind))
    ends = [("<s>", tok.bos_token_id), ("</s>", tok.eos_token_id)]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tok.backend_tokenizer.post_processor = template
    return tok


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def chat_view(request: pytest.FixtureRequest) -> ModelView:
    """A view of a tiny model whose tokenizer has a chat template."""
    return wrap(*tiny.fresh("llama", request.param, chat=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "subject", "start"), SUBJECTS)
def test_subject_ends_where_reading_says(kind: str, text: str, subject: str, start: int):
    """The subject's position is the token with which the text so far first says it whole."""
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, text)
    assert subject_span(text, subject) == (start, start + len(subject))
    wanted = last_by_reading(tok, encoded, start + len(subject))
    assert subject_position(encoded, subject) == wanted


@pytest.mark.parametrize(
    ("text", "subject", "start"),
    [
        pytest.param("Rene\u0301 met Rene in Rome", "Rene", 10, id="combining-accent"),
        pytest.param("रामायण में राम का वर्णन", "राम", 11, id="devanagari-vowel-sign"),
        pytest.param("كتابَه وكتاب كتابٌ كتاب", "كتاب", 19, id="arabic-vowel-mark"),
    ],
)
def test_a_word_goes_on_behind_a_combining_mark(text: str, subject: str, start: int):
    """An occurrence that a combining mark continues is part of a longer word."""
    assert subject_span(text, subject) == (start, start + len(subject))


@pytest.mark.parametrize("subject", ["Spain", "france", "Frances", "France is not"])
def test_an_absent_subject_is_refused_in_one_line(subject: str):
    """A subject that the text does not hold, letter for letter, is a one-line RequestError."""
    with pytest.raises(RequestError, match="is not in the prompt") as caught:
        subject_span("The capital\nof France is", subject)
    assert "\n" not in str(caught.value)
    assert repr(subject) in str(caught.value)


def test_only_the_text_from_start_on_counts():
    """An occurrence before `start` is passed over, and one that only begins before it as well."""
    text = "Rome and Rome"
    assert subject_span(text, "Rome", 1) == (9, 13)
    with pytest.raises(RequestError):
        subject_span(text, "Rome", 10)


@pytest.mark.parametrize("span", [(30, 34), (24, 24), (0, 0)])
def test_a_span_without_characters_has_no_token(span: tuple[int, int]):
    """A span that is empty or behind the text is refused, not rounded to some token."""
    encoded = encode(tiny.tokenizer("bpe"), "The capital of France is")
    with pytest.raises(RequestError, match="no token covers"):
        tokens_of(encoded, span)


def test_the_beginning_token_is_in_front_and_never_chosen():
    """With SentencePiece the ids begin with BOS, which covers no character."""
    tok = tiny.tokenizer("sentencepiece")
    encoded = encode(tok, "Paris is big")
    assert encoded.ids[0] == tok.bos_token_id
    assert encoded.offsets[0] == (0, 0)
    assert subject_position(encoded, "P") > 0
    assert encode(tok, "Paris is big", special=False).ids == encoded.ids[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["The capital of France is", "Rome", ""])
def test_no_end_token_stays_behind(kind: str, text: str):
    """An end token that the tokenizer adds is dropped, and only that."""
    ended = encode(with_end(kind), text)
    tok = tiny.tokenizer(kind)
    plain = tuple(tok(text, add_special_tokens=False)["input_ids"])
    assert ended.ids == (tok.bos_token_id, *plain)
    assert len(ended.offsets) == len(ended.ids)


def test_an_end_token_that_the_text_spells_out_is_kept():
    """What a person typed stays, even where it is a special token."""
    ended = encode(with_end("bpe"), "Rome</s>")
    assert ended.ids[-1] == tiny.tokenizer("bpe").eos_token_id
    assert ended.offsets[-1] == (4, 8)


def test_a_tokenizer_without_offsets_is_refused():
    """A slow tokenizer is a ModelError that says what to use instead."""
    with pytest.raises(ModelError, match="fast tokenizer"):
        encode(SimpleNamespace(is_fast=False), "Rome")


@pytest.mark.parametrize(
    ("text", "target", "between"),
    [
        ("The capital is", "Paris", " "),
        ("The capital is ", "Paris", ""),
        ("The capital is\n", "Paris", ""),
        ("The capital is", " Paris", ""),
        ("The capital is", "\nParis", ""),
        ("", "Paris", ""),
        ("Paris", ", France", ""),
        ("Paris", ".", ""),
        ("Столица это", "Париж", " "),
        ("العاصمة هي", "باريس", " "),
        ("राजधानी", "दिल्ली", " "),
        ("서울은", "한국의 수도", " "),
        ("首都は", "東京", ""),
        ("首都は", "Paris", ""),
        ("The capital is", "東京", ""),
        ("カ", "キ", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
    ],
)
def test_separator(text: str, target: str, between: str):
    """A space stands between prompt and answer unless the text or its script has none."""
    assert separator(text, target) == between


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "target"), JOINED)
def test_prompt_and_target_join_at_the_ids(kind: str, prompt: str, target: str):
    """The prompt's ids stay, and with the answer's they read as prompt, separator and target."""
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, prompt)
    assert encoded.ids == tuple(tok(prompt)["input_ids"])
    ids = continuation(tok, encoded, target)
    assert ids
    assert read(tok, encoded.ids + ids, prompt) == prompt + separator(prompt, target) + target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "target"), UNSPACED)
def test_no_space_slips_in_where_none_belongs(kind: str, prompt: str, target: str):
    """Where nothing stands between prompt and answer, the ids read so too (SentencePiece as well).

    SentencePiece puts a space in front of a text that stands alone, as an answer does.
    """
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, prompt)
    ids = continuation(tok, encoded, target)
    assert read(tok, encoded.ids + ids, prompt) == prompt + target


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_in_the_target_changes_nothing(kind: str):
    """A target with and without its leading space is the same answer, with one space."""
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, "The capital of Italy is")
    assert continuation(tok, encoded, "Rome") == continuation(tok, encoded, " Rome")
    assert "  " not in read(tok, encoded.ids + continuation(tok, encoded, " Rome"), encoded.text)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelled_in_the_prompt_do_not_change_the_answer(kind: str):
    """An answer is the same ids behind a prompt that spells its own BOS, as chat templates do."""
    tok = tiny.tokenizer(kind)
    bare = encode(tok, "The capital of Italy is")
    spelled = encode(tok, "<s>The capital of Italy is", special=False)
    assert spelled.ids[0] == tok.bos_token_id
    assert continuation(tok, spelled, "Rome") == continuation(tok, bare, "Rome")


@pytest.mark.parametrize("kind", KINDS)
def test_no_space_slips_in_behind_a_frame_that_spells_bos(kind: str):
    """Behind a frame that begins with BOS and ends its line, the answer has no space in front."""
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, "<s>The capital of Italy is\n", special=False)
    ids = continuation(tok, encoded, "Rome")
    assert read(tok, ids, "Rome") == "Rome"
    assert read(tok, encoded.ids + ids, encoded.text).endswith("is\nRome")


def test_a_chat_frame_moves_the_content(chat_view: ModelView):
    """In a chat the user's own words begin at `content`, behind frame and system text."""
    prompt = "The capital of France is"
    for system, before in [(None, ""), ("France is in Europe.", ""), (None, "New Fact: x\n")]:
        encoded = chat_view.encode(prompt, chat=True, system=system, before=before)
        assert encoded.text[encoded.content :].startswith(prompt)
        assert encoded.content > 0
        assert encoded.text.endswith("<|assistant|>\n")


def test_the_subject_is_sought_in_the_users_words(chat_view: ModelView):
    """A subject that the system text and the text in front name too is found in the prompt."""
    prompt = "The capital of France is"
    system = "France, said the user: the capital of France is not Rome."
    chats = [
        chat_view.encode(prompt, chat=True, system=system),
        chat_view.encode(prompt, chat=True, system=prompt),
        chat_view.encode(prompt, chat=True, before="France is old. "),
        chat_view.encode(prompt, before="France is old. "),
    ]
    for encoded in chats:
        start = encoded.text.rindex(prompt) + prompt.index("France")
        wanted = last_by_reading(chat_view.tokenizer, encoded, start + len("France"))
        assert subject_position(encoded, "France") == wanted


@pytest.mark.parametrize("prompt", ["an", "is", "a"])
def test_the_users_words_are_not_sought_in_the_frame(chat_view: ModelView, prompt: str):
    """A prompt that the frame behind it happens to spell as well ("assistant") keeps its place."""
    encoded = chat_view.encode(prompt, chat=True)
    assert encoded.content == encoded.text.index(f"{prompt}<|end|>")


def test_an_answer_in_a_chat_follows_the_frame(chat_view: ModelView):
    """Behind a frame that ends its line the answer has no space in front."""
    tok = chat_view.tokenizer
    encoded = chat_view.encode("The capital of France is", chat=True)
    ids = continuation(tok, encoded, "Paris")
    said = tok.decode([*encoded.ids, *ids], clean_up_tokenization_spaces=False)
    assert said.endswith("<|assistant|>\nParis")


WORDS = st.sampled_from(
    [
        "France",
        "capital",
        "Anna",
        "naïve",
        "x",
        "Москва",
        "北京",
        "दिल्ली",
        "باريس",
        "😀",
        "C++",
        "1969",
    ]
)
GAPS = st.sampled_from([" ", ", ", " - ", "\n"])


@st.composite
def sentences(draw: st.DrawFn) -> tuple[str, str, int]:
    """A text of random words, a subject in it that occurs nowhere else, and where it begins."""
    subject = draw(st.sampled_from(["Ann Lee", "Ann", "Ким", "东京塔", "राम", "ليلى", "🚀🚀", "é"]))
    before = "".join(word + gap for word, gap in draw(st.lists(st.tuples(WORDS, GAPS), max_size=4)))
    after = "".join(gap + word for gap, word in draw(st.lists(st.tuples(GAPS, WORDS), max_size=4)))
    return before + subject + after, subject, len(before)


@pytest.mark.parametrize("kind", KINDS)
@fixed
@given(made=sentences())
def test_position_property(kind: str, made: tuple[str, str, int]):
    """The chosen token covers the subject's last character, and no later token touches it."""
    text, subject, start = made
    end = start + len(subject)
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, text)
    chosen = subject_position(encoded, subject)
    first, stop = encoded.offsets[chosen]
    assert first < end <= stop
    assert all(begin >= end for begin, _ in encoded.offsets[chosen + 1 :])
    assert chosen == last_by_reading(tok, encoded, end)


SPACED = st.lists(
    st.sampled_from(
        ["France", "is", "the", "Rome", "Zürich", "Москва", "باريس", "दिल्ली", "I'm", "7"]
    ),
    min_size=1,
    max_size=5,
).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@fixed
@given(prompt=SPACED, target=SPACED, spaced=st.booleans())
def test_join_property(kind: str, prompt: str, target: str, spaced: bool):
    """Any prompt and answer of words read as both with one space, the prompt's ids untouched."""
    tok = tiny.tokenizer(kind)
    encoded = encode(tok, prompt)
    ids = continuation(tok, encoded, " " + target if spaced else target)
    assert encoded.ids == tuple(tok(prompt)["input_ids"])
    assert read(tok, encoded.ids + ids, prompt) == f"{prompt} {target}"
