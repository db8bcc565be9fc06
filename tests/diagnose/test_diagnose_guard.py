"""The guardrails within a merge: what a sample of a plan says, and the plan with one coefficient."""

from __future__ import annotations

from pathlib import Path

import pytest
from diagnose_samples import vocabulary

import tiny
from geomerge.diagnose import Thresholds, check, diagnose, make_global
from geomerge.diagnose.guard import Guard
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory
from geomerge.recipe import loads

ADAPTIVE = "schedule: H"
GLOBAL = "parameters: {t: 0.5}"


def planned(
    root: Path, b: str, how: str = ADAPTIVE, method: str = "slerp", **limits: float
) -> tuple[Plan, Guard | None]:
    """The plan of a merge of a and b, and what the guardrails say."""
    text = (
        f"merge_method: {method}\nbase_model: {root}/a\nmodels: [{{model: {root}/a}}, {{model: {root}/{b}}}]\n{how}\n"
    )
    plan, opened = make_plan(loads(text))
    try:
        return plan, check(plan, opened, Thresholds(**limits))
    finally:
        for checkpoint in opened:
            checkpoint.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model, a fine-tune, a near copy and a stranger."""
    made = tiny.llama(tmp_path / "a", 1, hidden_size=128, intermediate_size=256, vocab_size=600)
    for name, step in (("b", 0.1), ("copy", 1e-4)):
        tiny.llama(tmp_path / name, 2, like=made, step=step, hidden_size=128, intermediate_size=256, vocab_size=600)
    tiny.llama(tmp_path / "stranger", 3, hidden_size=128, intermediate_size=256, vocab_size=600)
    return tmp_path


def test_estimate(root: Path) -> None:
    """The sample's ω̄ is the full measurement's within two per cent."""
    for name in ("b", "stranger"):
        _, guard = planned(root, name)
        assert guard is not None
        full = diagnose(root / "a", root / name).pairs[0].score.omega_bar
        assert guard.omega_bar == pytest.approx(full, rel=0.02)


def test_verdicts(root: Path) -> None:
    """Each guardrail by itself, in the order of their weight."""
    small = {"small": 1e-9}
    for b, how, limits, verdict, said in (
        ("stranger", ADAPTIVE, {}, "divergent", "far apart"),
        ("copy", ADAPTIVE, {}, "near_duplicate", "changes little"),
        ("b", ADAPTIVE, {}, "small", "below 1B"),
        ("b", ADAPTIVE, small, "fine", None),
        ("b", GLOBAL, {}, "fine", None),
    ):
        _, guard = planned(root, b, how, **limits)
        assert guard is not None
        assert guard.verdict == verdict
        assert (said is None) == (not guard.messages)
        assert said is None or said in guard.messages[0]
        assert guard.falls_back == (verdict in ("divergent", "small"))
        assert guard.to_manifest("warn")["verdict"] == verdict


def test_other_methods_have_no_guard(root: Path) -> None:
    """The guardrails are about SLERP."""
    assert planned(root, "b", GLOBAL.replace("t:", "weight:"), "linear")[1] is None


def test_vocabulary(root: Path) -> None:
    """O comes from the row plan, when there is one."""
    words = ["[UNK]", *(f"w{i}" for i in range(599))]
    vocabulary(root / "a", words)
    vocabulary(root / "b", [*words[:300], *(f"x{i}" for i in range(300))])
    _, guard = planned(root, "b", f"{GLOBAL}\ntokenizer_source: union")
    assert guard is not None
    assert guard.overlap == pytest.approx(1 / 3)
    assert guard.verdict == "vocabulary"
    assert guard.aligns


def test_one_coefficient(root: Path) -> None:
    """The plan that an enforced guardrail makes is the global merge, bit for bit."""
    adaptive, guard = planned(root, "b")
    assert guard is not None
    assert guard.t == pytest.approx(0.5, abs=0.05)
    wanted, _ = planned(root, "b", GLOBAL)
    made = make_global(adaptive, 0.5)
    assert made.hash != adaptive.hash
    assert {n.method for n in made.output_nodes()} == {n.method for n in wanted.output_nodes()}
    assert tiny.same(run_in_memory(made), run_in_memory(wanted))
