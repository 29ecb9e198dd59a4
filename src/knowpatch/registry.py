"""One registry for everything that plugs in: methods now, datasets and metrics later.

A plug-in is one Python file. Its name is the file's stem, so names are known without importing
anything; the file is imported when it is asked for, and registers its class with the decorator.
Files come from a package folder, from installed entry points, and from the folders named by an
environment variable (for a method that is still being written).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Generic, TypeVar

from knowpatch.errors import OptionError, PatchError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes of one kind, imported on first use.

    Args:
        kind: what the entries are, for messages ("method").
        package: dotted name of the package whose files are entries, searched with sub-folders.
        group: entry point group of installed plug-ins.
        variable: environment variable with further folders, separated as in PATH.
    """

    def __init__(self, kind: str, *, package: str, group: str, variable: str) -> None:
        self.kind, self.package, self.group, self.variable = kind, package, group, variable
        self._found: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter the class under `name`, which must be its file's stem."""

        def enter(entry: T) -> T:
            self._found[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """All names, sorted, without importing any of them."""
        return sorted(self._loaders())

    def get(self, name: str) -> T:
        """The entry called `name`; OptionError with the nearest name if there is none."""
        if name not in self._found:
            loaders = self._loaders()
            if name not in loaders:
                raise OptionError(f"unknown {self.kind} {name!r}: {did_you_mean(name, loaders)}")
            try:
                loaders[name]()
            except Exception as error:  # a plug-in's own fault, in a file that is being written
                raise OptionError(
                    f"the file of {self.kind} {name!r} cannot be imported "
                    f"({type(error).__name__}: {error})"
                ) from error
        if name not in self._found:
            raise OptionError(
                f"the file of {self.kind} {name!r} registers no {self.kind} of that name: "
                f"decorate its class with register({name!r})"
            )
        return self._found[name]

    def versioned(self, kind: str) -> T:
        """The entry whose `kind` is this "name@version", as a patch names it.

        Raises:
            PatchError: none is, in one line with those that are.
        """
        name = kind.partition("@")[0]
        found = self._found.get(name)  # asked at every pass: the folders are not searched again
        if found is None and name in self.names():
            found = self.get(name)
        if found is None or getattr(found, "kind", None) != kind:
            known = ", ".join(str(getattr(self.get(each), "kind", each)) for each in self.names())
            raise PatchError(
                f"unknown {self.kind} {kind!r}; this version of knowpatch knows: {known or 'none'}"
            )
        return found

    def _loaders(self) -> Mapping[str, Callable[[], object]]:
        loaders: dict[str, Callable[[], object]] = {}
        for entry in metadata.entry_points(group=self.group):
            loaders[entry.name] = entry.load
        for folder in filter(None, os.environ.get(self.variable, "").split(os.pathsep)):
            for path in self._files(Path(folder)):
                loaders[path.stem] = lambda path=path: _import_file(path)  # type: ignore[misc]
        root = Path(importlib.import_module(self.package).__path__[0])
        for path in self._files(root):
            dotted = ".".join([self.package, *path.relative_to(root).with_suffix("").parts])
            loaders[path.stem] = lambda dotted=dotted: importlib.import_module(dotted)  # type: ignore[misc]
        return loaders

    @staticmethod
    def _files(root: Path) -> list[Path]:
        return sorted(p for p in root.rglob("*.py") if not p.stem.startswith("_"))


def _import_file(path: Path) -> object:
    """Import one file that belongs to no package, once."""
    name = f"knowpatch_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} is not a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
