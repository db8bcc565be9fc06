"""The score, the guardrails and the decision flow, every branch with its value."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomerge.diagnose import Score, Thresholds
from geomerge.diagnose.decision import Decision, Evidence, decide, specialist_of
from geomerge.diagnose.thresholds import parse_threshold, read_thresholds
from geomerge.errors import RecipeError, UsageError

unit = st.floats(0, 1)


def judged(
    omega: float = 0.1,
    overlap: float = 1.0,
    billions: float = 3.0,
    thresholds: Thresholds | None = None,
    **more: Any,
) -> Decision:
    """The decision about a pair."""
    score = Score(overlap, math.cos(omega), omega)
    return decide(Evidence(score, int(billions * 1e9), **{"models": ("a", "b"), **more}), thresholds)


def test_literal_score() -> None:
    """S = αO + βĀ − γω̄; a right angle takes away as much as the others give at most."""
    assert Score(0.5, 0.25, 0.1, alpha=2, beta=3, gamma=4).value == pytest.approx(1 + 0.75 - 0.4)
    assert Score(1, 1, 0).value == Score(1, 1, 0).best == 2
    assert Score(1, 0, math.pi / 2).value == pytest.approx(0)


@given(unit, unit, st.floats(0, 3), unit, st.floats(0, 3))
def test_score_is_monotone(o: float, a: float, w: float, more: float, wider: float) -> None:
    """S rises with O and falls with ω̄."""
    assert Score(max(o, more), a, w).value >= Score(min(o, more), a, w).value
    assert Score(o, a, max(w, wider)).value <= Score(o, a, min(w, wider)).value
    assert Score(1.0, a, w).value > Score(0.5, a, w).value
    assert Score(o, a, w + 0.1).value < Score(o, a, w).value


@pytest.mark.parametrize(
    ("billions", "mode", "schedule", "size"),
    [
        (0.5, "global_slerp", None, "<1B"),
        (1.1, "layer_adaptive", "H65", "1B"),
        (2.0, "layer_adaptive", "H", "2B"),
        (3.2, "layer_adaptive", "S", "3B"),
        (6.0, "layer_adaptive", "H65", "6B"),
        (7.2, "layer_adaptive", "H", "7B"),
        (70.0, "layer_adaptive", "H", "7B"),
    ],
)
def test_size_classes(billions: float, mode: str, schedule: str | None, size: str) -> None:
    """The schedule that the paper found for each size."""
    found = judged(billions=billions)
    assert (found.mode, found.schedule, found.size_class) == (mode, schedule, size)
    assert found.t == (0.65 if schedule == "H65" else 0.5)
    assert found.coefficients["default"] == found.t


def test_variants_of_size_classes() -> None:
    """Aligned 3B models get Q, 2B models of two families one coefficient and a warning."""
    assert judged(aligned=True).schedule == "Q"
    strangers = judged(billions=2, same_family=False)
    assert (strangers.mode, strangers.schedule) == ("global_slerp", None)
    assert any("not of one family" in w for w in strangers.warnings)


def test_guardrail_angle() -> None:
    """(i): beyond τ_ω one coefficient, or alignment where a rotation explains it; beyond `stop` nothing."""
    assert judged(omega=0.5).mode == "layer_adaptive"
    assert judged(omega=0.51).mode == "global_slerp"
    assert judged(omega=0.51).schedule is None
    assert judged(omega=0.9).mode == "do_not_merge"
    assert judged(omega=1.4, likeness=0.1).mode == "do_not_merge"
    turned = judged(omega=1.4, likeness=0.95, residual=True)
    assert (turned.mode, turned.scope) == ("align_then_merge", "residual")
    assert judged(omega=1.4, likeness=0.95).scope == "embedding"
    assert judged(omega=0.9, thresholds=Thresholds(angle=1.0, stop=1.2)).mode == "layer_adaptive"


def test_guardrail_overlap() -> None:
    """(ii): below τ_O the embeddings are aligned first; the schedule stays what the size says."""
    found = judged(overlap=0.7)
    assert (found.mode, found.scope, found.schedule) == ("align_then_merge", "embedding", "S")
    assert judged(overlap=0.9).mode == "layer_adaptive"
    assert judged(overlap=0.7, omega=0.9).mode == "do_not_merge"
    assert judged(overlap=0.7, omega=0.6).mode == "align_then_merge"
    assert judged(overlap=0.7, billions=0.5).schedule is None


def test_near_duplicates() -> None:
    """Below τ_dup there is little to gain."""
    assert judged(omega=0.0049).mode == "near_duplicate"
    assert judged(omega=0.0051).mode == "layer_adaptive"
    assert judged(omega=0.0).merges


def test_unsound_pairs() -> None:
    """NaN and other heads stop everything else."""
    assert judged(not_finite=("b: w holds 1 NaN",)).mode == "do_not_merge"
    blocked = judged(blocking=("the numbers of attention heads differ",))
    assert blocked.mode == "do_not_merge"
    assert blocked.reasons == ("the numbers of attention heads differ",)


def test_specialists() -> None:
    """At 7B a specialist is aligned first, or refused; elsewhere it is a warning."""
    assert judged(billions=7, specialist="b").mode == "do_not_merge"
    aligned = judged(billions=7, specialist="b", likeness=0.9)
    assert (aligned.mode, aligned.scope) == ("align_then_merge", "embedding")
    assert any("b is a specialist" in w for w in judged(specialist="b").warnings)
    assert specialist_of([1.0, 3.5], ("a", "b"), 3.0) == "b"
    assert specialist_of([1.0, 2.5], ("a", "b"), 3.0) is None
    assert specialist_of([math.nan, 2.5], ("a", "b"), 3.0) is None


def test_several_models() -> None:
    """One coefficient for three models is two thirds for the two others; the first is who follows instructions."""
    found = judged(billions=0.5, models=("a", "b", "c"), first=1)
    assert found.t == pytest.approx(2 / 3)
    assert found.order == (1, 0, 2)


def test_path_is_told() -> None:
    """The steps hold the values; the text has the headline, reasons and warnings."""
    found = judged(omega=0.6)
    assert [s.passed for s in found.steps] == [True, True, True, False]
    assert "ω̄ = 0.6 rad" in found.steps[-1].value
    text = str(found)
    assert text.startswith("merge with one coefficient everywhere (global SLERP): t = 0.5\n- ")
    assert "\n! score the result" in text


def test_thresholds_are_settings(tmp_path: Path) -> None:
    """From Python, from a file, from the command line; nonsense is refused."""
    path = tmp_path / "limits.yml"
    path.write_text("angle: 0.3\nsimilarity: cka\n")
    assert read_thresholds(path) == replace(Thresholds(), angle=0.3, similarity="cka")
    assert dict([parse_threshold("angle=0.6")]) == {"angle": 0.6}
    for text in ("angle", "angle=", "=1"):
        with pytest.raises(UsageError, match="NAME=VALUE"):
            parse_threshold(text)
    with pytest.raises(UsageError, match="no threshold 'angel'") as caught:
        Thresholds().changed({"angel": 1})
    assert "'angle'" in str(caught.value)
    for wrong in (
        {"angle": -1},
        {"angle": "wide"},
        {"overlap": 1.5},
        {"similarity": "l2"},
        {"angle": 0.9},
        {"one": 9.0},
    ):
        with pytest.raises(UsageError):
            Thresholds().changed(wrong)
    path.write_text("angle: 0.3\nangel: 1\n")
    with pytest.raises(RecipeError, match=r"limits\.yml:2: there is no threshold 'angel'"):
        read_thresholds(path)
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="mapping"):
        read_thresholds(path)


@given(st.floats(0, 2), unit, st.floats(0.05, 80), st.booleans(), st.one_of(st.none(), unit))
def test_every_pair_gets_a_decision(
    omega: float, overlap: float, billions: float, same: bool, likeness: float | None
) -> None:
    """Whatever the values: a mode with a reason, coefficients within [0, 1], a path."""
    found = judged(omega, overlap, billions, same_family=same, likeness=likeness)
    assert found.reasons
    assert found.steps
    anchors = [v for c in found.coefficients.values() for v in (c if isinstance(c, list) else [c])]
    assert all(0 <= v <= 1 for v in anchors)
    assert (found.scope is not None) == (found.mode == "align_then_merge")


def test_more_than_two_models_weigh_the_same() -> None:
    """t is not one of a pair's then, and is explained."""
    found = judged(billions=0.5, models=("a", "b", "c"))
    assert found.t == pytest.approx(2 / 3)
    assert any("1 − 1/3" in reason for reason in found.reasons)
    assert not any("0.65" in reason for reason in found.reasons)
    assert any("0.5 to 0.65" in reason for reason in judged(billions=0.5).reasons)
