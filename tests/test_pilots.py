"""The pilot requests that ship with the library: valid, distinct, and mixed from the start."""

from __future__ import annotations

from importlib import resources

import pytest

from knowpatch import probes
from knowpatch.errors import OptionError
from knowpatch.parts.pilots import pilots
from knowpatch.parts.spans import subject_span
from knowpatch.request import read_requests

ALL = pilots()


def _subjects(requests):
    return {request.subject.casefold() for request in requests}


def test_there_are_120_about_60_subjects():
    """Two facts of each subject, and no prompt twice."""
    assert len(ALL) == 120
    assert len(_subjects(ALL)) == 60
    assert len({request.prompt for request in ALL}) == 120
    assert len({request.target.casefold() for request in ALL}) > 100


@pytest.mark.parametrize("request_", ALL, ids=lambda request: request.prompt)
def test_each_is_one_clean_fact(request_):
    """A whole-word subject in the prompt, a target of one to three words that is not in it."""
    prompt, subject, target = request_.prompt, request_.subject, request_.target
    start, stop = subject_span(prompt, subject)
    assert not prompt[start - 1 : start].isalnum()
    assert not prompt[stop : stop + 1].isalnum()
    assert 1 <= len(target.split()) <= 3
    assert target.casefold() not in prompt.casefold()
    for text in (prompt, subject, target):
        assert text == text.strip()
        assert "  " not in text
    assert not prompt.endswith((".", "?", "!"))
    assert request_.kind == "insert"
    assert (request_.old, request_.rephrases, request_.id) == (None, (), None)


@pytest.mark.parametrize("count", [10, 20, 37, 60, 100, 120])
def test_any_first_few_are_a_mix(count):
    """Half of the subjects open their prompt, and few subjects come twice."""
    few = pilots(count)
    assert few == ALL[:count]
    opening = sum(request.prompt.startswith(request.subject) for request in few)
    assert abs(opening - count / 2) <= 1
    assert len(_subjects(few)) == min(count, 60)


def test_some_subjects_stand_last():
    """Before nothing but a mark: the last token of the subject is next to the answer."""
    last = [request for request in ALL if request.prompt.endswith(f"{request.subject}:")]
    assert len(last) >= 4


def test_no_pilot_is_a_control():
    """What is asked to see whether a model is unharmed is not what it was calibrated on."""
    assert not {request.prompt for request in ALL} & set(probes.controls())


def test_read_once():
    assert pilots() is pilots()
    assert pilots(5) is pilots(5)


@pytest.mark.parametrize("count", [0, -1, 121])
def test_a_count_that_is_not_there(count):
    with pytest.raises(OptionError, match=f"{count} is not a number from 1 to 120"):
        pilots(count)


def test_the_asset_is_a_request_file():
    """What ships can be given to the command line as it is."""
    with resources.as_file(resources.files("knowpatch") / "assets" / "pilots.jsonl") as path:
        assert tuple(read_requests(path)) == ALL
