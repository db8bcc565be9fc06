"""``geomerge tokens``: what vocabularies have in common, and what each policy would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson

if TYPE_CHECKING:
    from geomerge.diagnose.tokens import TokenComparison
    from geomerge.diagnose.vocabularies import Overview


def tokens(
    models: Annotated[list[str], typer.Argument(metavar="A B [C...]", help="Model directories or hub ids.")],
    allow_pickle: AllowPickle = False,
    json: AsJson = False,
) -> None:
    """Compare vocabularies, and show what each policy for the output's would do.

    The overlap, ids, special tokens and chat templates; for each policy the rows of the output and where every model's
    rows would come from. The first model counts as the base. No weight is read.
    """
    from geomerge.cli.console import write_json
    from geomerge.diagnose.vocabularies import overview
    from geomerge.errors import UsageError

    if len(models) < 2:
        raise UsageError("tokens compares two models or more", hint="geomerge tokens A B")
    found = overview(models, allow_pickle=allow_pickle)
    if json:
        write_json(found.to_json())
    else:
        _show(found)


def _show(found: Overview) -> None:
    from geomerge.cli.console import bullets, clean, facts, heading, show, table

    def number(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    first = [
        [
            clean(m["model"]),
            clean(m["tokenizer"] or "none"),
            number(m["tokens"]),
            number(m["rows"]),
            number(m["added_tokens"]),
            "yes" if m["chat_template"] else "no",
        ]
        for m in found.models
    ]
    columns = ["model", "tokenizer", "tokens", "rows", "added", "chat template"]
    show(table(columns, first, right=["tokens", "rows", "added"]))
    for name, pair, words in found.pairs:
        show(heading(f"{clean(found.models[0]['model'])} and {clean(name)}"), facts(_pair(pair, words)))
    rows, notes = [], []
    for policy in found.policies:
        if policy.refused:
            notes.append(f"{clean(policy.name)}: refused: {clean(policy.refused)}")
            continue
        for model, counts in (policy.counts or {}).items():
            cells = [f"{counts[key]:,}" for key in ("own", "borrowed", "mean", "zero", "padding")]
            rows.append([clean(policy.name), f"{policy.rows:,}", clean(model), *cells])
        notes += [f"{clean(policy.name)}: {clean(note)}" for note in policy.notes]
    numbers = ["rows", "own", "borrowed", "mean", "zero", "padding"]
    show(heading("policies"), table(["policy", "rows", "model", *numbers[1:]], rows, right=numbers))
    if notes:
        show(heading("notes"), bullets(notes))


def _pair(pair: TokenComparison, words: str) -> list[tuple[str, str]]:
    from geomerge.cli.console import clean

    said = [("overlap", f"{100 * pair.overlap:.4g} % of all tokens, by meaning")]
    if pair.assumed:
        return [("overlap", clean(pair.assumed))]
    said.append(("tokens", f"{pair.shared:,} shared, {pair.only_a:,} and {pair.only_b:,} in one only"))
    if pair.same_ids is not None:
        said.append(("ids", f"{100 * pair.same_ids:.4g} % of the shared tokens have the same id"))
    if words:
        said.append(("as written", clean(words)))
    differ = [f"{role}: {a!r} and {b!r}" for role, (a, b) in (pair.specials_differ or {}).items()]
    if pair.specials is not None:
        said.append(("special", clean("; ".join(differ)) if differ else "all agree"))
    said.append(("chat template", pair.chat))
    return said
