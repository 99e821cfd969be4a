"""Modules that can be called, for commands that share their name with a function."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(module: str, function: str) -> None:
    """Let calls of the module named `module` go to `function`, "package.module:name", imported at the first call.

    `from seg import predict` gives the module `seg.predict`, whatever `seg/__init__.py` holds, once anything has
    imported it. So the module itself must do what the function does. Python supports a class of one's own for modules.
    """
    place, _, name = function.partition(":")

    class Callable(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(place), name)(*args, **options)

    sys.modules[module].__class__ = Callable
