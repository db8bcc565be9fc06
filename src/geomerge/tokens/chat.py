"""The output's chat template: the inputs' most common one, a bundled one, Jinja text, or a file.

The bundled templates, written from the formats' public descriptions, lie in ``chat_templates``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from geomerge.errors import DamagedCheckpoint, RecipeError, did_you_mean
from geomerge.tokens.vocabulary import read_json

BUNDLED = ("alpaca", "chatml", "exaone", "llama3", "mistral")

# transformers' own block, which marks what an assistant says for training; plain Jinja does not know it.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def read(directory: str | Path) -> str | None:
    """The chat template of the model in `directory`; None when it has none.

    ``chat_template.jinja`` comes before ``chat_template.json`` and ``tokenizer_config.json``; of several named
    templates it is the one named "default".

    Raises:
        DamagedCheckpoint: A file is not valid JSON or not text.
    """
    directory = Path(directory)
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (read_json(directory / name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            default = named.get("default")
            if isinstance(default, str):
                return default
    return None


def bundled(name: str) -> str:
    """The text of the bundled template `name`, one of `BUNDLED`."""
    folder = resources.files("geomerge.tokens") / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def resolve(
    value: str | None, inputs: Sequence[str | Path | None], *, where: str | None = None, folder: Path | None = None
) -> str | None:
    """The Jinja text that the recipe's ``chat_template`` asks for.

    Args:
        value: "auto", a name of `BUNDLED`, Jinja text, the path of a file that holds it, or None.
        inputs: The inputs' directories in the recipe's order; None for an input without one.
        where: The recipe's ``file:line``.
        folder: What relative paths are relative to; the working directory when None.

    Returns:
        The template; None when `value` is None or when "auto" finds none, so that the tokenizer keeps its own.

    Raises:
        RecipeError: No such name or file, or the Jinja text has a syntax error.
    """
    if value is None:
        return None
    if value == "auto":
        found = [read(directory) for directory in inputs if directory is not None]
        templates = Counter(template for template in found if template is not None)
        # Counter keeps insertion order among equals: a tie goes to the first input's.
        return templates.most_common(1)[0][0] if templates else None
    if value in BUNDLED:
        return bundled(value)
    if "{{" not in value and "{%" not in value:
        file = (folder or Path()) / value
        if "\n" in value or len(value) > 1024 or not file.is_file():
            raise RecipeError(
                f"the chat template {value.splitlines()[0] if value else ''!r} is not a bundled name, not Jinja text, "
                "and not a file",
                where=where,
                hint=did_you_mean(value, ("auto", *BUNDLED)),
            )
        value, where = _text(file), str(file)
    _check_syntax(value, where)
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(f"the chat template is not UTF-8 text: {error}", where=str(file)) from error


def _check_syntax(template: str, where: str | None) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            where=where,
            hint="Correct it, or use `auto` or a bundled one: " + ", ".join(BUNDLED) + ".",
        ) from error
