"""How a recipe names a model: ``path[@revision][:subfolder][+lora…]``.

A path that exists on disk is taken as it is, so directories with ``@`` or ``+`` in their names work.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from geomerge.errors import RecipeError
from geomerge.recipe.values import ModelRef, Where

_LOCAL = re.compile(r"[/\\.~]|[A-Za-z]:[/\\]")


def parse_reference(text: str, where: Where, names: Container[str] = ()) -> ModelRef:
    """A model reference from its text.

    Args:
        text: As in the recipe or on the command line.
        where: For messages.
        names: Names of other documents of the recipe: taken literally.

    Raises:
        RecipeError: It is empty, or has more ``+`` or ``@`` than can be told apart.
    """
    if _literal(text, names):
        return ModelRef(expand_home(text), written=text)
    cuts = [position for position, sign in enumerate(text) if sign == "+"]
    if not cuts:
        return replace(_split(text, where, names), written=text)
    whole_left = [cut for cut in cuts if _literal(text[:cut], names)]
    whole_right = [cut for cut in cuts if _literal(text[cut + 1 :], names)]
    if len(cuts) > 1 and not (whole_left or whole_right):
        raise RecipeError(
            f"the model {text!r} has more than one '+'",
            where=str(where),
            hint="one '+' joins a model and its LoRA; a directory with '+' in its name must exist",
        )
    cut = whole_left[-1] if whole_left else whole_right[0] if whole_right else cuts[0]
    lora = replace(_split(text[cut + 1 :], where, names), written=text[cut + 1 :])
    return replace(_split(text[:cut], where, names), lora=lora, written=text)


def _split(text: str, where: Where, names: Container[str]) -> ModelRef:
    """Path, revision and subfolder."""
    if _literal(text, names):
        return ModelRef(expand_home(text))
    text, subfolder = _cut_subfolder(text, where)
    if subfolder is not None and _exists(text):
        return ModelRef(expand_home(text), subfolder=subfolder)
    path, sign, revision = text.partition("@")
    # A local directory has no revisions: '/home/u@corp/m' that does not exist is a mistyped path, not '/home/u'.
    if sign and _LOCAL.match(text) and not _exists(path):
        path, sign, revision = text, "", ""
    if not path.strip() or (sign and not revision):
        raise RecipeError(f"the model {text!r} has no {'revision' if path.strip() else 'path'}", where=str(where))
    if "+" in text or "@" in revision:
        raise RecipeError(
            f"the model {text!r} cannot be told apart into path and revision",
            where=str(where),
            hint="write it as a mapping: {model: {path: …, revision: …}, lora: {path: …, revision: …}}",
        )
    return ModelRef(expand_home(path), revision or None, subfolder=subfolder)


def _cut_subfolder(text: str, where: Where) -> tuple[str, str | None]:
    """What stands before and after the colon. Of a local path that does not exist a colon is a part."""
    before, sign, subfolder = text.rpartition(":")
    if not sign or (_LOCAL.match(text) and not _exists(before)):
        return text, None
    if not before or not subfolder.strip("/") or ":" in before:
        raise RecipeError(
            f"the model {text!r} cannot be told apart into model and subfolder",
            where=str(where),
            hint="write owner/name:folder, or owner/name@revision:folder",
        )
    return before, subfolder


def _literal(text: str, names: Container[str]) -> bool:
    return text in names or _exists(text)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(expand_home(text)).exists()
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        return False


def expand_home(text: str) -> str:
    """The path with ``~`` expanded, unchanged otherwise (a hub id must not be normalised)."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:  # no such user
        return text
