"""What a user's script may call: not run, but checked by mypy, which `make test` does."""

from __future__ import annotations

import torch

import geomerge as gm


def calls() -> list[object]:
    """All verbs."""
    report = gm.merge("recipe.yml", "out", force=True)
    plan = gm.plan("recipe.yml")
    tensors = gm.merge_state_dicts("recipe.yml", {"a": {"w": torch.ones(2)}})
    decision = gm.diagnose("a", "b", base="base").decision
    scores = gm.evaluate("out", ["skills/recall"], parents=["a", "b"])
    found = gm.search("study.yml", "found")
    gm.moe("moe.yml", "mixture")
    gm.continue_merge("state", ["a"], base="base")
    gm.transplant("model", "donor", "out")
    told: list[object] = [report.seconds, plan, tensors["w"].shape, decision, scores, found, gm.inspect("a")]
    try:
        gm.load_recipe("recipe.yml")
    except gm.RecipeError as error:
        told += [error.where, error.hint, error.exit_code]
    return told
