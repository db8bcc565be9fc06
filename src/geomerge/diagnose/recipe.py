"""A decision as a recipe that `geomerge merge` runs as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from geomerge.diagnose.decision import Decision
from geomerge.errors import UsageError


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe needs beside the decision.

    Attributes:
        models: The references as given, in the given order.
        dtype: The output's dtype.
        policy: The vocabularies differ, so that a policy is needed.
        unmatched: Some tensors are in some models only.
    """

    models: tuple[str, ...]
    dtype: str
    policy: bool
    unmatched: bool


def to_recipe(decision: Decision, facts: RecipeFacts) -> str:
    """The decision as YAML, its reasons as comments.

    Args:
        decision: What to do.
        facts: See `RecipeFacts`.

    Raises:
        UsageError: The decision is not to merge.
    """
    if not decision.merges:
        raise UsageError("the decision is not to merge, so there is no recipe", hint="; ".join(decision.reasons))
    models = [_reference(facts.models[i]) for i in decision.order]
    lines = [
        *_comment(f"geomerge diagnose: {decision.headline}"),
        *_comment(
            f"O = {decision.overlap:.3f}, Ā = {decision.similarity:.4f}, mean angle {decision.omega_bar:.4g} rad, "
            f"S = {decision.score:.3f}, size class {decision.size_class}"
        ),
        *(line for reason in decision.reasons for line in _comment(f"- {reason}")),
        *(line for warning in decision.warnings for line in _comment(f"! {warning}")),
    ]
    several = len(models) > 2
    method = "layer_adaptive_slerp" if decision.schedule is not None or several else "slerp"
    lines += [f"merge_method: {method}", f"base_model: {_quoted(models[0])}", "models:"]
    lines += [f"  - model: {_quoted(m)}" for m in models]
    if decision.schedule is not None:
        lines.append(f"schedule: {decision.schedule}")
    else:
        lines.append(f"parameters: {{t: {decision.t:.6g}}}")
    if facts.policy:
        lines.append("tokenizer_source: base")
    if decision.scope is not None:
        lines.append(f"align: {{scope: {decision.scope}}}")
    if facts.unmatched:
        lines.append("unmatched: copy")
    lines.append(f"dtype: {facts.dtype}")
    return "\n".join(lines) + "\n"


def _reference(text: str) -> str:
    """A local path in full, so that the recipe can be run from anywhere; a hub id as it is."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def _quoted(text: str) -> str:
    """A YAML scalar: a JSON string is one, as long as what YAML would fold or refuse is written as an escape."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _comment(text: str) -> Sequence[str]:
    safe = "".join(c if c.isprintable() else " " for c in text)
    return [f"# {line}" for line in wrap(safe, 84, subsequent_indent="  ", break_long_words=False)]
