"""geomerge.tokens against mergekit 0.1.5: the embeddings that it writes, reproduced from row plans.

The stored cases were made by tests/peer/make_token_cases.py. mergekit appends tokens in an order that differs from run
to run, so rows are compared token by token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geomerge.recipe.values import ModelRef, TokenizerSpec, TokenRule
from geomerge.tokens.policy import build
from token_samples import load

DATA = Path(__file__).parent / "data" / "tokens"
CASES: dict[str, Any] = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))


def parsed_rule(token: str, entry: dict[str, Any]) -> TokenRule:
    """A rule as the recipe's grammar has it."""
    source = entry["source"]
    force = entry.get("force", False)
    if isinstance(source, str):
        return TokenRule(token, "model", ModelRef(source), force=force)
    if source["kind"] == "zero":
        return TokenRule(token, "zero", force=force)
    return TokenRule(
        token, "model_token", ModelRef(source["model"]), source.get("token"), source.get("token_id"), force=force
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tensor", ["embedding", "head"])
def test_the_peers_rows(name: str, tensor: str) -> None:
    """The mean of the re-indexed inputs is mergekit's output, row by row, in float32."""
    case = CASES[name]
    arrays = np.load(DATA / "embeddings.npz")
    matrices = [arrays[f"{model}/{tensor}"] for model in case["models"]]
    source = case["source"] if case["source"] in ("union", "base") else ModelRef(case["source"])
    rules = tuple(parsed_rule(token, entry) for token, entry in case.get("tokens", {}).items())
    plan = build(
        TokenizerSpec(source, rules, case.get("pad_to_multiple_of")),
        [(ModelRef(m), load(DATA / m), len(matrix)) for m, matrix in zip(case["models"], matrices)],
        case["models"].index(case["base"]) if case["base"] else None,
        cut_padding=True,
    )
    merged = np.mean([plan.rows_for(k).apply(matrices) for k in range(len(matrices))], axis=0, dtype=np.float64)
    expected = arrays[f"case/{name}/{tensor}"]
    assert merged.shape == expected.shape
    ids: dict[str, int] = case["ids"]
    ours = {token: row for row, token in enumerate(plan.names) if token is not None}
    assert ours.keys() == ids.keys()
    if case["source"] != "union" and not rules:
        assert ours == ids
    for token, row in ids.items():
        np.testing.assert_allclose(merged[ours[token]], expected[row], rtol=2e-6, atol=1e-6, err_msg=token)
    np.testing.assert_allclose(merged[len(ids) :], expected[len(ids) :], rtol=2e-6, atol=1e-6)
