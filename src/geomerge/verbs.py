"""Packages that are called like their main function: ``gm.evaluate(...)`` beside ``gm.evaluate.Scores``."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def call_as(package: str, home: str) -> None:
    """Make a package callable.

    Args:
        package: Its full name; the function's name is the last part.
        home: The module in it that has the function, imported by the first call.
    """
    verb = package.rpartition(".")[2]

    class Verb(types.ModuleType):
        """A module that is called like its main function."""

        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(f"{package}.{home}"), verb)(*args, **options)

    sys.modules[package].__class__ = Verb
