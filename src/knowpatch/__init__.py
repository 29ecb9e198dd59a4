"""knowpatch: change what a language model knows, as measured, reversible, shippable patches.

The public names are loaded when they are first used, so `import knowpatch` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Ask": "ask",
    "EditMethod": "method",
    "EditRequest": "request",
    "EditedModel": "edited",
    "KnowpatchError": "errors",
    "MethodConfig": "method",
    "Patch": "patch",
    "edit": "editing",
    "load": "editing",
    "METHODS": "method",
    "register": "method",
    "read_requests": "request",
    "ship": "export.ship",
}

__all__ = sorted([*_WHERE, "__version__"])

if TYPE_CHECKING:
    from knowpatch.ask import Ask as Ask
    from knowpatch.edited import EditedModel as EditedModel
    from knowpatch.editing import edit as edit
    from knowpatch.editing import load as load
    from knowpatch.errors import KnowpatchError as KnowpatchError
    from knowpatch.export.ship import ship as ship
    from knowpatch.method import METHODS as METHODS
    from knowpatch.method import EditMethod as EditMethod
    from knowpatch.method import MethodConfig as MethodConfig
    from knowpatch.method import register as register
    from knowpatch.patch import Patch as Patch
    from knowpatch.request import EditRequest as EditRequest
    from knowpatch.request import read_requests as read_requests


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'knowpatch' has no attribute {name!r}")
    return getattr(import_module(f"knowpatch.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
