"""What models' vocabularies have in common, and what each policy for the output's vocabulary would do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geomerge.diagnose.tokens import TokenComparison, compare
from geomerge.engine.models import Model, Models
from geomerge.errors import GeomergeError
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE, TokenizerSpec
from geomerge.tokens.compare import difference
from geomerge.tokens.policy import build
from geomerge.tokens.rows import TokenPlan


@dataclass(frozen=True)
class Policy:
    """What a policy would do.

    Attributes:
        name: As a recipe writes it.
        rows: Rows of the output's embedding.
        added, removed: Tokens of the source's tokenizer that the output has beside, and lacks.
        counts: For every model how many rows are its own, borrowed, means, zeros, sums and padding.
        notes: What the user should know.
        refused: Why it cannot be carried out; empty otherwise.
    """

    name: str
    rows: int = 0
    added: int = 0
    removed: int = 0
    counts: dict[str, dict[str, int]] | None = None
    notes: tuple[str, ...] = ()
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        if self.refused:
            return {"policy": self.name, "refused": self.refused}
        return {
            "policy": self.name,
            "rows": self.rows,
            "added": self.added,
            "removed": self.removed,
            "models": self.counts,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Overview:
    """Several models' vocabularies.

    Attributes:
        models: For every model: its name, kind of tokenizer, tokens, rows of its embedding, added tokens, and whether it has
            a chat template.
        pairs: The first model beside each other one: (name, how they compare, in words what differs literally).
        policies: What each policy would do, the first model being the base.
    """

    models: tuple[dict[str, Any], ...]
    pairs: tuple[tuple[str, TokenComparison, str], ...]
    policies: tuple[Policy, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "models": list(self.models),
            "pairs": [
                {"first": self.models[0]["model"], "second": name, **found.to_json(), "difference": words}
                for name, found, words in self.pairs
            ],
            "policies": [policy.to_json() for policy in self.policies],
        }


def overview(models: Sequence[str], *, allow_pickle: bool = False) -> Overview:
    """Compare the vocabularies of models, and try every policy. No weight is read.

    Args:
        models: Directories or hub ids; the first counts as the base.
        allow_pickle: Open pickled weights (for their shapes).

    Raises:
        ModelError: A model cannot be opened.
    """
    opened = Models(allow_pickle=allow_pickle)
    try:
        found = [opened.get(parse_reference(text, NOWHERE)) for text in models]
        first = found[0]
        sources: list[Any] = ["base", "union", "intersection", *dict.fromkeys(m.ref for m in found[1:])]
        return Overview(
            models=tuple(map(_describe, found)),
            pairs=tuple((str(m), compare(first, m), _words(first, m)) for m in found[1:]),
            policies=tuple(_try(source, found) for source in sources),
        )
    finally:
        for checkpoint in opened.inputs:
            checkpoint.close()


def _describe(model: Model) -> dict[str, Any]:
    from geomerge.diagnose.tokens import has_chat

    vocabulary = model.vocabulary
    return {
        "model": str(model),
        "tokenizer": None if vocabulary is None else vocabulary.kind,
        "tokens": None if vocabulary is None else len(vocabulary.ids),
        "rows": model.embedding_rows(),
        "added_tokens": None if vocabulary is None else len(vocabulary.added),
        "chat_template": has_chat(model) is not None,
    }


def _words(a: Model, b: Model) -> str:
    va, vb = a.vocabulary, b.vocabulary
    if va is None or vb is None or "opaque" in (va.kind, vb.kind):
        return ""
    return difference(va, vb).describe(str(a), str(b))


def _try(source: Any, models: Sequence[Model]) -> Policy:
    name = source if isinstance(source, str) else str(source)
    try:
        plan = build(TokenizerSpec(source), [(m.ref, m.vocabulary, m.embedding_rows() or 0) for m in models], 0)
    except GeomergeError as error:
        return Policy(name, refused=error.what)
    return _policy(name, plan)


def _policy(name: str, plan: TokenPlan) -> Policy:
    return Policy(
        name,
        rows=plan.size,
        added=len(plan.tokenizer.appended),
        removed=len(plan.tokenizer.lost),
        counts=plan.counts(),
        notes=plan.notes,
    )
