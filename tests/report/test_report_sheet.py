"""Scores arranged for a report: means, intervals, differences, the headline; runs and their coefficients."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from samples import merged, scores

from geomerge.errors import DamagedCheckpoint, UsageError
from geomerge.evaluate.scores import PairedRow, Score, Scores
from geomerge.report.build import Inputs, build, read_inputs
from geomerge.report.coefficients import read_coefficients
from geomerge.report.headline import headline
from geomerge.report.runs import read_run
from geomerge.report.score_sections import paired_table, scores_overview
from geomerge.report.section import Cell
from geomerge.report.sheet import Interval, Sheet, checked, combine, mean_of
from geomerge.report.words import amount, number, percent, seconds, signed, visible


def literal(value: float = 0.8, gap: float = 0.05) -> Scores:
    """One merge, one parent, two tasks, with numbers that can be checked by hand."""
    made = scores(("m",), ("p",), ("t1", "t2"), base=None)
    values = {("m", "t1"): value, ("m", "t2"): value, ("p", "t1"): value - gap, ("p", "t2"): value - gap}
    return dataclasses.replace(
        made,
        scores=tuple(Score(m, t, v, v - 0.03, v + 0.04, 1.0) for (m, t), v in values.items()),
        paired=tuple(PairedRow("m", t, "p", gap, gap - 0.06, gap + 0.08, 0.2, "mcnemar") for t in ("t1", "t2")),
    )


def test_mean_of_independent_intervals() -> None:
    """Arms of 3 and 4 below, 6 and 8 above: √(9 + 16) / 2 and √(36 + 64) / 2."""
    found = mean_of([Interval(10, 7, 16), Interval(20, 16, 28)])
    assert (found.value, found.low, found.high) == (15.0, 15 - 2.5, 15 + 5.0)
    assert not mean_of([Interval(10, 7, 16), Interval(20)]).known


def test_mean_interval_agrees_with_resampling() -> None:
    """For shares of right answers on several tasks the mean's interval has the width that resampling gives."""
    import numpy as np

    generator = np.random.default_rng(3)
    samples = [generator.random(400) < p for p in (0.3, 0.6, 0.8)]

    def interval(draws: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(low), float(high)

    resampled = [generator.choice(s, (4000, 400)).mean(axis=1) for s in samples]
    parts = [Interval(float(s.mean()), *interval(r)) for s, r in zip(samples, resampled, strict=True)]
    found, (low, high) = mean_of(parts), interval(np.mean(resampled, axis=0))
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)


def test_headline_claims_what_the_interval_shows() -> None:
    """A difference whose interval holds zero is called unclear; one that does not is given."""
    said, lead = headline(combine([("s", literal(gap=0.05))]), ())
    assert said == "m scores 80.0\u00a0% over 2 tasks, 5.0\u00a0points above its best parent, p."
    assert "+5.0\u00a0points" in lead[0]
    assert "+0.8 to +10.7" in lead[0]
    said, _ = headline(combine([("s", literal(gap=0.01))]), ())
    assert "not clearly different from its best parent, p." in said
    _, lead = headline(combine([("s", dataclasses.replace(literal(), settings={"limit": 20}))]), ())
    assert "first 20 samples" in lead[0]
    said, _ = headline(combine([("s", literal(gap=-0.1))]), ())
    assert "10.0\u00a0points below its best parent" in said


def test_no_paired_rows_no_interval() -> None:
    """Without paired rows the difference is that of the means, and no interval is invented."""
    sheet = Sheet(dataclasses.replace(literal(), paired=()), ())
    found = sheet.difference("m", "p")
    assert found is not None
    assert found.value == pytest.approx(0.05)
    assert not found.known


def test_directions() -> None:
    """Where lower is better the lowest is best; where directions are mixed there is no mean."""
    base = literal()
    down = tuple(dataclasses.replace(t, higher_is_better=False) for t in base.tasks)
    sheet = Sheet(dataclasses.replace(base, tasks=down), ())
    assert sheet.mean("m") is not None
    assert not sheet.all_fractions
    two = dataclasses.replace(base, models=(*base.models, dataclasses.replace(base.models[0], name="worse")))
    rows = tuple(Score("worse", t, 0.9, 0.8, 1.0) for t in ("t1", "t2"))
    sheet = Sheet(dataclasses.replace(two, tasks=down, scores=base.scores + rows), ())
    assert [m.name for m in sheet.merges] == ["m", "worse"]
    mixed = Sheet(dataclasses.replace(base, tasks=(base.tasks[0], down[1])), ())
    assert mixed.mean("m") is None
    assert mixed.difference("m", "p") is None


def test_table_cells() -> None:
    """The scores' table: value, interval, and the best of each column in bold."""
    table = scores_overview(Sheet(literal(), ()))
    assert table.columns == ("model", "role", "mean", "kept", "t1", "t2")
    assert list(table.rows[0].cells)[4:] == [Cell("80.0", "77–84", "strong")] * 2
    assert list(table.rows[1].cells)[4:] == [Cell("75.0", "72–79", "")] * 2
    paired = paired_table(Sheet(literal(), ()), literal().models[0])
    assert paired is not None
    assert list(paired.rows[0].cells) == ["t1", Cell("+5.0", "−1.0 to +13.0", ""), "0.200"]
    assert list(paired.rows[-1].cells) == ["mean", Cell("+5.0", "+0.8 to +10.7", "strong"), ""]


def test_missing_scores_are_dashes() -> None:
    """A score that is not there, or is not a number, is a dash and gives no mean."""
    made = literal()
    rows = tuple(dataclasses.replace(s, value=math.nan) if s.task == "t2" else s for s in made.scores if s.model == "m")
    sheet = Sheet(dataclasses.replace(made, scores=rows), ())
    assert sheet.mean("m") is None
    assert [c if isinstance(c, str) else c.text for c in scores_overview(sheet).rows[0].cells][2:] == [
        "–",
        "–",
        "80.0",
        "–",
    ] or (scores_overview(sheet).rows[0].cells[5] == "–")
    assert build(Inputs((), (sheet,))).html()


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan, 1e308, 1e30, -5.0, 0.0])
def test_numbers_from_strangers(odd: float) -> None:
    """Whatever number stands anywhere in a scores file, the page is made."""
    made = scores(("m", "n"), ("p", "q"), ("t1", "t2"))
    for change in (
        {"scores": tuple(dataclasses.replace(s, value=odd) for s in made.scores[:1]) + made.scores[1:]},
        {"scores": tuple(dataclasses.replace(s, value=odd, low=odd, high=odd, seconds=odd) for s in made.scores)},
        {
            "scores": tuple(dataclasses.replace(s, normalised=odd) for s in made.scores),
            "paired": tuple(dataclasses.replace(p, difference=odd, low=odd, high=odd, p=odd) for p in made.paired),
            "synergy": tuple(dataclasses.replace(s, expected=odd, delta=odd, improvement=odd) for s in made.synergy),
            "means": tuple(dataclasses.replace(m, value=odd, normalised=odd) for m in made.means),
            "tasks": tuple(dataclasses.replace(t, chance=odd, samples=-1) for t in made.tasks),
        },
    ):
        page = build(Inputs((), tuple(combine([("s", dataclasses.replace(made, **change))])))).html()  # type: ignore[arg-type]
        assert "nan" not in page.split("</style>", 1)[1].lower().replace("provenance", "")
        assert ">inf<" not in page


def test_importing_is_cheap() -> None:
    """The package and the verb come without what draws."""
    heavy = "{'matplotlib', 'jinja2', 'torch', 'scipy'}"
    code = f"import sys, geomerge.report, geomerge.cli.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_combine() -> None:
    """Files of the same tasks and parents become one sheet; other tasks make another; another model of a name is renamed."""
    one, two = literal(0.8), literal(0.6)
    other = dataclasses.replace(two.models[0], hash="f" * 64)
    two = dataclasses.replace(two, models=(other, *two.models[1:]))
    sheets = combine([("one", one), ("two", two), ("again", one)])
    assert len(sheets) == 1
    assert [m.name for m in sheets[0].merges] == ["m", "m (ffffffff)"]
    assert len(sheets[0].parents) == 1
    mean = sheets[0].mean("m (ffffffff)")
    assert mean is not None
    assert mean.value == pytest.approx(0.6)
    assert len(combine([("one", one), ("other", scores())])) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"models": ()}, "hold no model"),
        ({"tasks": ()}, "hold no task"),
        ({"models": literal().models * 2}, "twice"),
        ({"tasks": literal().tasks * 2}, "twice"),
        ({"scores": (Score("stranger", "t1", 1, 1, 1),)}, "the model 'stranger'"),
        ({"scores": (Score("m", "other", 1, 1, 1),)}, "the task 'other'"),
        ({"paired": (PairedRow("m", "t1", "nobody", 0, 0, 0, None, "bootstrap"),)}, "the model 'nobody'"),
    ],
)
def test_rows_must_fit(change: dict[str, object], what: str) -> None:
    """Scores that contradict themselves are refused."""
    with pytest.raises(UsageError, match=what):
        checked(dataclasses.replace(literal(), **change), "scores.json")  # type: ignore[arg-type]


def test_coefficients_of_a_schedule(tmp_path: Path) -> None:
    """A SLERP's t over depth is found again at every role and block, for both parents."""
    (found,) = read_coefficients(read_run(merged(tmp_path, "slerp")))
    assert found.quantity == "coefficient"
    assert found.vary
    a, b = found.grids
    assert (a.title, b.title) == ("a", "b")
    assert a.columns == ("in", "0", "1", "2", "3", "4", "5", "out")
    assert set(a.roles) == {"attention", "mlp", "norm", "embedding"}
    # t = [0, .5, .3, .7, 1] over six blocks, linear in between: 0, .4, .38, .46 + .08·…, as the recipe's page says.
    attention = [b.values["attention", str(i)] for i in range(6)]
    assert attention == pytest.approx([0.0, 0.4, 0.38, 0.54 - 0.08, 0.76, 1.0], abs=1e-3)
    assert [a.values["attention", str(i)] for i in range(6)] == pytest.approx([1 - t for t in attention], abs=1e-3)
    assert a.values["embedding", "in"] == pytest.approx(0.5, abs=1e-3)


def test_coefficients_of_one_value(tmp_path: Path) -> None:
    """TIES has no coefficients: its weights and densities by parent are given in words."""
    run = read_run(merged(tmp_path, "ties"))
    found = {c.quantity: c for c in read_coefficients(run)}
    assert not any(c.vary for c in found.values())
    assert [(g.title, set(g.values.values())) for g in found["density"].grids] == [("a", {0.5}), ("b", {0.5})]
    page = build(Inputs((run,), ())).html()
    assert "0.5 a, 0.5 b in every tensor" in page
    assert "about 0.5 a" not in page
    assert "ties merges a, b and base with ties" in page


def test_timing_is_matched_by_plan(tmp_path: Path) -> None:
    """The output of `merge --json` gives a run its time."""
    run = merged(tmp_path, "slerp")
    plan = json.loads((run / "geomerge.json").read_text())["plan"]
    told = tmp_path / "merge.json"
    told.write_text(json.dumps({"out": str(run), "plan": plan, "seconds": 12.5, "peak_memory": 300_000_000}))
    found = read_inputs([run, told]).runs[0].timing
    assert found is not None
    assert (found.seconds, found.peak_memory) == (12.5, 300_000_000)
    page = build(read_inputs([run, told])).html()
    assert "12 s" in page
    assert "300 MB" in page
    told.write_text(json.dumps({"out": str(run), "plan": "another", "seconds": 12.5}))
    assert read_inputs([run, told]).runs[0].timing is None


@pytest.mark.parametrize(
    "damage",
    [
        {"tensors": None},
        {"tensors": {"x": 1}},
        {"tensors": {"x": {"rule": "merge", "method": 99}}},
        {"tensors": {"x": {"rule": "merge", "coefficients": ["1"]}}},
        {"tensors": {"x": {"rule": "merge", "rounding_loss": "much"}}},
        {"stages": []},
        {"stages": [{}]},
        {"inputs": [{"model": 3}]},
        {"inputs": [{"model": "a", "adapter": 3}]},
        {"methods": [{"name": "slerp"}]},
        {"versions": []},
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    """A manifest of the wrong shape gives one clear error."""
    run = merged(tmp_path, "slerp")
    place = run / "geomerge.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | damage))
    with pytest.raises(DamagedCheckpoint, match="the manifest is damaged"):
        read_run(run)


def test_a_record_without_weights(tmp_path: Path) -> None:
    """The manifest alone is enough for a page."""
    run = merged(tmp_path, "slerp")
    (run / "model.safetensors").unlink()
    found = read_run(run)
    assert found.nbytes is None
    assert "How it was merged" in build(Inputs((found,), ())).html()


def test_words() -> None:
    """Numbers as they are printed."""
    assert [percent(v) for v in (0.931, -0.0004, None, math.nan)] == ["93.1", "0.0", "–", "–"]
    assert [signed(v) for v in (0.05, -0.05, 0.0)] == ["+5.0", "−5.0", "0.0"]
    assert [number(v) for v in (-1.234567, 12345.0, math.inf)] == ["−1.23", "1.23e+04", "–"]
    assert [amount(v) for v in (999, 1000, 988_000_000)] == ["999 B", "1 kB", "988 MB"]
    assert [seconds(v) for v in (0.031, 4.25, 73.2, 720)] == ["0.03 s", "4.2 s", "73 s", "12 min"]
    assert visible("a\x1bb\n") == "a\\x1bb\\n"
    assert len(visible("x" * 1000, 50)) <= 50
