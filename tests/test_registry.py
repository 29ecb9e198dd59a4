"""The registry: names without imports, and plug-in files that fail in one line."""

from __future__ import annotations

import sys

import pytest

from knowpatch.errors import OptionError, PatchError
from knowpatch.method import METHODS
from knowpatch.parts.rules import RULES


def test_names_are_known_without_importing(monkeypatch, tmp_path):
    """A file in a plug-in folder is listed by its stem and not run."""
    (tmp_path / "explodes.py").write_text("raise SystemError('imported')")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(tmp_path))
    assert "explodes" in METHODS.names()


def test_an_unknown_name_gets_the_nearest(monkeypatch):
    """Did you mean, and all that is allowed."""
    with pytest.raises(
        OptionError, match=r"did you mean 'rome'.*allowed: .*ft, .*grace, .*ice, .*rome"
    ):
        METHODS.get("romee")


def test_a_file_that_fails_is_one_line(monkeypatch, tmp_path):
    """An error on import, and a file that registers nothing, say which file it is."""
    (tmp_path / "explodes.py").write_text("raise SystemError('no\\nway')")
    (tmp_path / "forgets.py").write_text("x = 1")
    monkeypatch.setenv("KNOWPATCH_METHODS", str(tmp_path))
    with pytest.raises(OptionError, match="method 'explodes' cannot be imported") as caught:
        METHODS.get("explodes")
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="registers no method of that name"):
        METHODS.get("forgets")
    sys.modules.pop("knowpatch_plugin_forgets", None)


def test_a_kind_that_was_found_is_not_searched_for_again(monkeypatch):
    """Wraps ask for their kinds at every pass; unknown versions are refused all the same."""
    kind = RULES.get(RULES.names()[0]).kind
    found = RULES.versioned(kind)
    monkeypatch.setattr(RULES, "_loaders", lambda: pytest.fail("searched again"))
    assert RULES.versioned(kind) is found
    monkeypatch.undo()
    with pytest.raises(PatchError, match="this version of knowpatch knows"):
        RULES.versioned(f"{kind}9")
