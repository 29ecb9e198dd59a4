"""What two questions have in common in their letters and words, without what every question has."""

from __future__ import annotations

import re

COMMON = """
a an and are as at be been by can could did do does for from had has have he her his how i in is it
its may me might my of on one or our shall she should so that the their them there these they this
those to was we were what when where which who whom whose why will with would you your
"""


def stripped(text: str) -> str:
    """A question without what says nothing of it; as it is (lower-cased) if nothing is left."""
    words = re.findall(r"\w+", re.sub(r"<[^<>]*>", " ", text.lower()))
    return (
        " ".join([word for word in words if word not in COMMON.split()] or words)
        or text.lower().strip()
    )


def distance(one: str, other: str) -> int:
    """Levenshtein distance of two short texts (editdistance.py has that of one and many)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        last, row[0] = row[0], number
        for place, against in enumerate(other, 1):
            last, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, last + (letter != against)),
            )
    return row[-1]
