"""The demo: two experts of the skills suite, diagnosed, merged in several ways, scored beside their parents, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.errors import UsageError

if TYPE_CHECKING:
    from geomerge.diagnose.diagnosis import Diagnosis
    from geomerge.evaluate import Scores
    from geomerge.evaluate.run import Progress
    from geomerge.lab.suite import Suite

PAIR = ("reasoning", "recall")
"""The two experts."""

RECIPES: Mapping[str, str] = {
    "linear": """\
merge_method: linear
models:
  - model: {a}
  - model: {b}
parameters: {{weight: 0.5}}
""",
    "slerp": """\
merge_method: slerp
base_model: {a}
models:
  - model: {a}
  - model: {b}
parameters: {{t: 0.5}}
""",
    "layer_adaptive_slerp": """\
merge_method: layer_adaptive_slerp
base_model: {a}
models:
  - model: {a}
  - model: {b}
schedule: S
""",
    "task_arithmetic": """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters: {{weight: 0.8}}
""",
    "ties": """\
merge_method: ties
base_model: {base}
models:
  - model: {a}
  - model: {b}
parameters: {{weight: 0.8, density: 0.8, normalize: false}}
""",
}


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        suite: The suite.
        diagnosis: Of the two experts.
        merged: Method → model directory.
        seconds: Method → seconds of its merge.
        scores: Of the merges, their parents and the base, on both skills.
        report, diagnosis_page: The HTML pages.
    """

    suite: Suite
    diagnosis: Diagnosis
    merged: Mapping[str, Path]
    seconds: Mapping[str, float]
    scores: Scores
    report: Path
    diagnosis_page: Path


def run_demo(out: Path, *, say: Callable[[str], None] = lambda text: None, progress: Progress | None = None) -> Demo:
    """Diagnose, merge, score and report.

    Args:
        out: A directory to make, or one that an earlier demo made.
        say: Told what is being done.
        progress: Watches the evaluation.

    Raises:
        UsageError: The directory holds something else.
    """
    import geomerge
    from geomerge.diagnose.report import write_report
    from geomerge.diagnose.run import diagnose
    from geomerge.evaluate import evaluate
    from geomerge.lab.suite import load_suite
    from geomerge.report.build import build, read_inputs, write

    if out.exists() and any(out.iterdir()) and not (out / "scores.json").exists() and not (out / "linear.yml").exists():
        raise UsageError(
            "the directory holds something that is not a demo", where=str(out), hint="name another with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    suite = load_suite("skills")
    places = {"base": suite.base, "a": suite.experts[PAIR[0]], "b": suite.experts[PAIR[1]]}
    say(f"geomerge diagnose {PAIR[0]} {PAIR[1]} --base base --report {out / 'diagnosis.html'}")
    diagnosis = diagnose(places["a"], places["b"], base=places["base"])
    write_report(diagnosis, out / "diagnosis.html")
    merged, seconds = {}, {}
    for method, text in RECIPES.items():
        recipe = out / f"{method}.yml"
        said = {name: json.dumps(str(path.resolve())) for name, path in places.items()}
        recipe.write_text(text.format(**said) + "dtype: float32\n", encoding="utf-8")
        merged[method] = out / method
        say(f"geomerge merge {recipe} {merged[method]}")
        seconds[method] = geomerge.merge(recipe, merged[method], force=True).seconds
    say("scoring the merges beside their parents")
    parents = {f"{name} expert": places[key] for name, key in zip(PAIR, "ab", strict=True)}
    tasks = [f"skills/{name}" for name in PAIR]
    scores = evaluate(merged, tasks, parents=parents, base={"base": suite.base}, progress=progress)
    scores.write(out / "scores.json")
    best = max(merged, key=lambda name: sum(scores.value(name, task.name) for task in scores.tasks))
    page = out / "report.html"
    write(build(read_inputs([out / "scores.json", merged[best]]), command="geomerge demo"), page)
    return Demo(suite, diagnosis, merged, seconds, scores, page, out / "diagnosis.html")
