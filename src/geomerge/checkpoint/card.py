"""The model card: the ``README.md`` of a merged model, with the front matter that the hub reads.

It holds no date and no path of this machine, so the same merge writes the same card. Every string that comes from a
model or a recipe is escaped for the place where it stands.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomerge.checkpoint.folder import check_contained

_README_LIMIT = 1 << 20
_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"})


@dataclass(frozen=True, slots=True)
class Parent:
    """One input of the merge, for its card.

    Attributes:
        name: What to call it: the hub id, or a local directory's last name.
        fingerprint: `Checkpoint.fingerprint`.
        hub_id: ``owner/name``, only if it came from the hub.
        revision: The hub's commit.
        licence: The licence's identifier as the parent's own card gives it, if it does.
        base: It is the merge's base model.
    """

    name: str
    fingerprint: str
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    base: bool = False


def model_card(
    *,
    name: str,
    method: str,
    parents: Sequence[Parent],
    recipe: str,
    version: str,
    title: str | None = None,
    paper: str | None = None,
    library: str = "transformers",
    command: str = "geomerge merge recipe.yml output",
    onto_base: bool = False,
    warnings: Sequence[str] = (),
) -> str:
    """Write the card.

    Args:
        name: The output's name.
        method: The recipe's ``merge_method``.
        parents: The inputs in the recipe's order.
        recipe: The recipe's text.
        version: geomerge's version.
        title: The method for people.
        paper: The method's publication.
        library: The hub's ``library_name``.
        command: How to make the model again.
        onto_base: The base is what the others' task vectors are added to, and none of them.
        warnings: Further sentences that a user of the model should read.

    Returns:
        Markdown with a YAML front matter. ``base_model`` lists hub ids only, never a local path.
    """
    licence, note = combine_licences({p.name: p.licence for p in parents})
    longest = max((len(run) for run in re.findall(r"`+", recipe)), default=0)
    fence = "`" * max(3, longest + 1)
    hub_ids = list(dict.fromkeys(p.hub_id for p in parents if p.hub_id))
    front = [
        *(["base_model:", *(f"- {_yaml(each)}" for each in hub_ids)] if hub_ids else []),
        "base_model_relation: merge",
        f"library_name: {_yaml(library)}",
        *([f"license: {_yaml(licence)}"] if licence else []),
        "tags:",
        *(f"- {_yaml(tag)}" for tag in dict.fromkeys(["merge", "geomerge", method])),
    ]
    added = sum(not p.base for p in parents) if onto_base else len(parents)
    models = f"{added} {'model' if added == 1 else 'models'}{' onto a base' if added < len(parents) else ''}"
    source = f" {_markdown(paper)}." if paper else ""
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {_markdown(name)}",
            "",
            (
                f"A merge of {models} with the method **{_markdown(title or method)}** (`{_code(method)}`), "
                f"made by [geomerge](https://github.com/geomerge/geomerge) {version}.{source}"
            ),
            "",
            "## Parents",
            "",
            "| model | role | revision | licence | fingerprint |",
            "|---|---|---|---|---|",
            *map(_row, parents),
            "",
            "## Recipe",
            "",
            f"{fence}yaml",
            recipe.strip("\n"),
            fence,
            "",
            "To make it again, save the recipe as `recipe.yml` and run",
            "",
            "```",
            _code(command),
            "```",
            "",
            (
                "`geomerge.json` beside this file records the versions, the inputs' hashes, the seed and what was done to "
                "every tensor."
            ),
            "",
            "## Licence",
            "",
            _markdown(note),
            *(line for warning in warnings for line in ("", f"> **Note.** {_markdown(warning)}")),
            "",
        ]
    )


def _row(parent: Parent) -> str:
    """A parent's line in the table."""
    cells = (
        _markdown(parent.hub_id or parent.name),
        "base" if parent.base else "",
        f"`{parent.revision[:12]}`" if parent.revision else "",
        _markdown(parent.licence or "not stated"),
        f"`{parent.fingerprint[:16]}`",
    )
    return f"| {' | '.join(cells)} |"


def combine_licences(licences: Mapping[str, str | None]) -> tuple[str | None, str]:
    """What can be said of the output's licence.

    Args:
        licences: Each parent's licence identifier by the parent's name; ``None`` where it states none.

    Returns:
        The identifier for the front matter (``None``: say nothing; ``"other"``: they differ), and a sentence. Whether
        two licences can be combined is a lawyer's question, so different ones are always reported and never resolved.
    """
    stated = {name: licence for name, licence in licences.items() if licence}
    silent = [name for name in licences if name not in stated]
    unknown = f" No licence is stated by {', '.join(silent)}: ask before you publish the merge." if silent else ""
    distinct = list(dict.fromkeys(stated.values()))
    if not distinct:
        return None, "None of the parents states a licence: ask before you publish the merge."
    if len(distinct) == 1:
        return (None if silent else distinct[0]), f"The parents' licence is {distinct[0]}.{unknown}"
    listed = "; ".join(f"{name}: {licence}" for name, licence in stated.items())
    return "other", (
        f"The parents' licences differ ({listed}). The merge is derived from all of them and must respect every one: "
        f"check that they can be combined before you publish it.{unknown}"
    )


def read_licence(folder: Path | None) -> str | None:
    """The licence identifier in the front matter of a model directory's ``README.md``, or ``None``.

    For ``license: other`` it is the ``license_name``.
    """
    if folder is None or not (folder / "README.md").is_file():
        return None
    path = folder / "README.md"
    check_contained(path, folder)
    with path.open("rb") as file:
        text = file.read(_README_LIMIT).decode("utf-8", "replace")
    front = re.match(r"\ufeff?---\r?\n(.*?)\n---", text, re.DOTALL)
    if front is None:
        return None
    found = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)", front[1], re.MULTILINE))
    licence = found.get("license")
    return found.get("license_name", licence) if licence == "other" else licence


def _yaml(text: str) -> str:
    """A scalar: bare where YAML cannot take it for anything else, otherwise quoted as JSON, which is YAML."""
    if re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


def _markdown(text: str) -> str:
    """Text that is nothing but text in Markdown, and stays in one table cell."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(one_line, quote=False))


def _code(text: str) -> str:
    return text.replace("`", "'")
