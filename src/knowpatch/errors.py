"""What can go wrong, as one tree of exceptions.

    KnowpatchError
    |- InputError             what a person gave cannot be used
    |  |- RequestError        an edit request, or a line of a request file
    |  |- DataError           a dataset, or a file of results
    |  |- OptionError         an unknown name, or a value that is not allowed
    |  |- ModelError          a model that cannot be found, read or edited this way
    |  `- PatchError          a patch file that is damaged, or of an unknown kind
    |     `- ForeignModelError   a patch that was made for another model
    |- Unscored               a score that there is none of
    `- EditError              the edit itself failed (a value that is not finite)

Each message is one line and says what was given, what is allowed and what to do. The command line
prints it and exits with 2; a library user catches the class.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 900
"""Characters of a message; what a person gave may be of any length."""


class KnowpatchError(Exception):
    """The root of every error that knowpatch raises on purpose."""

    def __str__(self) -> str:
        """One line that a terminal can show: no control characters, and an end."""
        text = super().__str__()
        plain = "".join(c if c.isprintable() or c.isspace() else ascii(c)[1:-1] for c in text)
        line = plain if "\n" not in plain else " ".join(plain.split())
        line = re.sub(r"[\t\r\v\f\u0085\u2028\u2029]", " ", line)
        return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


class InputError(KnowpatchError):
    """What a person gave cannot be used."""


class RequestError(InputError):
    """An edit request, or a line of a request file, that cannot be used."""


class DataError(InputError):
    """A dataset, a record of it, or a file of results, that cannot be used."""


class OptionError(InputError):
    """An unknown name or option, or a value that is not allowed."""


class ModelError(InputError):
    """A model that cannot be found, read, or edited in the way asked for."""


class PatchError(InputError):
    """A patch file that is damaged, not a patch, or of a kind this version does not know."""


class ForeignModelError(PatchError):
    """A patch that was made for another model."""


class Unscored(KnowpatchError):
    """A score that there is none of, which is not zero."""


class EditError(KnowpatchError):
    """An edit that could not be computed."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The tail of a message about an unknown `name`: the nearest allowed one, and all of them."""
    options = sorted(allowed)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(options) or 'none'}"


def not_apart(kind: str) -> PatchError:
    """A patch whose facts cannot be taken out one by one, and what to do."""
    return PatchError(
        f"the facts of a patch of kind {kind} cannot be taken out one by one: "
        "make it again from the requests that stay"
    )
