"""Does layer-adaptive SLERP beat one coefficient, and does the score S foretell a merge's synergy? On the lab's suites.

    python benchmarks/layer_adaptive.py                    # both parts, three seeds: docs/layer_adaptive_slerp.md, figures
    python benchmarks/layer_adaptive.py --parts synergy --seeds 0

Part one merges pairs of experts with one coefficient, with every named schedule, with the searched six scalars, and as
the decision of `geomerge diagnose` says. Part two merges pairs that differ in task, length of fine-tuning and base in
the middle, and compares S.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geomerge as gm
from geomerge.engine.live import LiveMerge
from geomerge.engine.schedule import PRESETS
from geomerge.lab.build import build
from geomerge.lab.skills.kind import SIZES, fine_tune, pool
from geomerge.lab.skills.language import load_model, save_model
from geomerge.lab.suite import Suite, load_suite
from geomerge.recipe import loads
from geomerge.report.section import Figure
from geomerge.search.study import make_study

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "layer_adaptive_slerp.md"
DATA = ROOT / "docs" / "layer_adaptive_slerp.json"
PAIRS = {
    "skills": (("choice", "recall"), ("instruction", "arithmetic"), ("reasoning", "story")),
    "glyphs": (("greek", "cyrillic"), ("upper", "math"), ("handwritten", "shapes")),
}
TS = (0.3, 0.4, 0.5, 0.6, 0.7)
LENGTHS = {"short": 0.4, "long": 3.0}
LENGTHENED = ("choice", "recall", "arithmetic")


def suite_for(name: str, seed: int) -> Suite:
    """A built suite, building it when it is not there."""
    try:
        return load_suite(f"{name}:tiny:{seed}")
    except gm.UsageError:
        return build(name, "tiny", seed)


class Pair:
    """Two models, and a module that their merges are blended onto.

    Args:
        suite: Whose tasks judge.
        paths: The two model directories.
        tasks: The tasks: each parent's own.
    """

    def __init__(self, suite: Suite, paths: tuple[Path, Path], tasks: tuple[str, str]) -> None:
        self.suite, self.paths = suite, tuple(map(str, paths))
        known = suite.tasks()
        self.tasks = [known[t] for t in tasks]
        self.module = suite.load(paths[0])
        self.live = LiveMerge({p: p for p in self.paths}, self.module)

    def accuracy(self, module: torch.nn.Module, split: Any = "test") -> float:
        """Mean accuracy on both tasks."""
        return float(np.mean([task.correct(module, split).mean() for task in self.tasks]))

    def merge(self, how: Mapping[str, Any], method: str = "slerp", split: Any = "test") -> float:
        """The score of one merge."""
        a, b = self.paths
        recipe = {"merge_method": method, "models": [{"model": a}, {"model": b}], "guardrails": "off", **how}
        if method != "linear":
            recipe["base_model"] = a
        self.live.blend(loads(json.dumps(recipe) + "\n"))
        return self.accuracy(self.module, split)


def merges(suite: Suite, pair: tuple[str, str], trials: int, scratch: Path) -> dict[str, float]:
    """Every way to merge one pair → test accuracy on both tasks."""
    paths = tuple(Path(suite.experts[t]) for t in pair)
    both = Pair(suite, paths, pair)  # type: ignore[arg-type]
    found = {"base": both.accuracy(suite.load("base"))}
    found |= {f"parent {i + 1}": both.accuracy(suite.load(p)) for i, p in enumerate(paths)}
    found["own expert each"] = float(
        np.mean([t.correct(suite.load(p), "test").mean() for t, p in zip(both.tasks, paths, strict=True)])
    )
    found["linear"] = both.merge({"parameters": {"weight": 1.0}}, "linear")
    found["global t = 0.5"] = both.merge({"parameters": {"t": 0.5}})
    validation = {t: both.merge({"parameters": {"t": t}}, split="validation") for t in TS}
    found["global, t chosen"] = both.merge({"parameters": {"t": max(validation, key=validation.__getitem__)}})
    found |= {f"schedule {name}": both.merge({"schedule": name}) for name in PRESETS}
    reference = f"{suite.name}:{suite.size}:{suite.seed}"
    study = make_study(
        {
            "parents": list(both.paths),
            "objective": {"tasks": [f"{reference}/{t}" for t in pair]},
            "budget": trials,
        }
    )
    search = gm.search(study, scratch / f"{suite.name}-{suite.seed}-{'-'.join(pair)}")
    found["searched, 6 scalars"] = search.held_out[0].value
    found["optimism of the search"] = search.optimism
    diagnosis = gm.diagnose(*both.paths)
    both.live.blend(loads(diagnosis.recipe()))
    found["decision's own"] = both.accuracy(both.module)
    return found


def trained(suite: Suite, task: str, share: float, out: Path) -> Path:
    """An expert fine-tuned for another number of steps."""
    settings, seed = SIZES[suite.size], suite.seed
    training = settings.training(task)
    model = load_model(Path(suite.models["base"]))
    part = pool(settings, seed, task, "hard")
    steps = max(round(share * training.steps), 1)
    fine_tune(model, [part], replace(training, steps=steps), seed, f"skills/{task}/{share}")
    out.mkdir(parents=True)
    save_model(model, out)
    return out


def synergy_pairs(seeds: Iterable[int], scratch: Path) -> list[dict[str, Any]]:
    """Pairs that differ in task, length and base → S with its parts, and what their merge in the middle gained."""
    suites = {seed: suite_for("skills", seed) for seed in seeds}
    first = next(iter(suites.values()))
    rows = []

    def add(suite: Suite, kind: str, one: tuple[str, Path], two: tuple[str, Path]) -> None:
        both = Pair(suite, (one[1], two[1]), (one[0], two[0]))
        parents = [both.accuracy(suite.load(p)) for p in (one[1], two[1])]
        merged = both.merge({"parameters": {"t": 0.5}})
        score = gm.diagnose(*both.paths).pairs[0].score
        rows.append(
            {
                "kind": kind,
                "pair": f"{one[0]}, {two[0]}",
                "S": score.value,
                "omega_bar": score.omega_bar,
                "similarity": score.similarity,
                "synergy": merged - sum(parents) / 2,
                "merged": merged,
            }
        )
        print(f"{kind}: {rows[-1]['pair']}: S {score.value:.3f}, synergy {100 * rows[-1]['synergy']:+.1f}", flush=True)

    names = list(first.experts)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            add(first, "tasks", (a, Path(first.experts[a])), (b, Path(first.experts[b])))
    other = {
        (task, length): trained(first, task, share, scratch / f"{task}-{length}")
        for task in LENGTHENED
        for length, share in LENGTHS.items()
    }
    for i, a in enumerate(LENGTHENED):
        for b in LENGTHENED[i + 1 :]:
            for la in LENGTHS:
                for lb in LENGTHS:
                    add(first, "lengths", (a, other[a, la]), (b, other[b, lb]))
    for suite in suites.values():
        if suite is not first:
            for a, b in (("choice", "recall"), ("instruction", "arithmetic"), ("reasoning", "story")):
                add(suite, "tasks", (a, Path(suite.experts[a])), (b, Path(suite.experts[b])))
                add(first, "bases", (a, Path(first.experts[a])), (b, Path(suite.experts[b])))
    return rows


def search_course(trials: int, scratch: Path) -> None:
    """One search's course and best schedules as pictures, as its report draws them."""
    from geomerge.report.drawing import to_png
    from geomerge.search.report import sections

    suite = suite_for("skills", 0)
    parents = [str(suite.experts[t]) for t in PAIRS["skills"][0]]
    tasks = [f"skills/{t}" for t in PAIRS["skills"][0]]
    study = make_study({"parents": parents, "objective": {"tasks": tasks}, "budget": trials})
    found = gm.search(study, scratch / "course")
    for section in sections(found):
        for part in section.parts:
            if isinstance(part, Figure) and part.name in ("course", "schedules"):
                PAGE.with_name("pictures").joinpath(f"search_{part.name}.png").write_bytes(to_png(part))


def interval(values: np.ndarray) -> str:
    """Mean ± half of the 95 % t interval, in points."""
    from scipy import stats

    mean = 100 * values.mean()
    half = 100 * float(stats.t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{mean:+.1f} ± {half:.1f}"


def merge_table(data: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Mean accuracies, and the difference to one coefficient of 0.5 over the pairs."""
    lines = []
    for suite in PAIRS:
        rows = [row for key, row in data.items() if key.startswith(suite)]
        if not rows:
            continue
        lines += [
            f"**{suite}**, {len(rows)} merges",
            "",
            "| | accuracy | against global t = 0.5 | better, worse |",
            "|---|---|---|---|",
        ]
        reference = np.array([row["global t = 0.5"] for row in rows])
        for name in rows[0]:
            if name.startswith("optimism"):
                continue
            values = np.array([row[name] for row in rows])
            gap = values - reference
            said = "" if name == "global t = 0.5" else interval(gap)
            wins = "" if not said else f"{int((gap > 1e-9).sum())}, {int((gap < -1e-9).sum())}"
            lines.append(f"| {name} | {100 * values.mean():.1f} | {said} | {wins} |")
        optimism = np.array([row["optimism of the search"] for row in rows])
        lines += ["", f"Optimism gap of the search (validation minus test): {interval(optimism)} points.", ""]
    return lines


def correlations(rows: list[dict[str, Any]]) -> list[str]:
    """Rank correlations of S and of its parts with synergy."""
    from scipy import stats

    lines = ["| pairs | number | Spearman's ρ of S and synergy | 95 % interval | p |", "|---|---|---|---|---|"]
    groups = {"all": rows, "one base": [r for r in rows if r["kind"] != "bases"]}
    groups |= {kind: [r for r in rows if r["kind"] == kind] for kind in ("tasks", "lengths", "bases")}
    for name, group in groups.items():
        s, gain = (np.array([r[k] for r in group]) for k in ("S", "synergy"))
        if len(group) < 4:
            continue
        rho, p = stats.spearmanr(s, gain)
        draws = np.random.default_rng(0).integers(0, len(group), (2000, len(group)))
        spread = [stats.spearmanr(s[d], gain[d]).statistic for d in draws if len(set(d)) > 3]
        low, high = np.nanpercentile(spread, [2.5, 97.5])
        lines.append(f"| {name} | {len(group)} | {rho:+.2f} | {low:+.2f} … {high:+.2f} | {p:.2g} |")
    return lines


def figures(data: Mapping[str, Any]) -> None:
    """Differences by schedule, and S against synergy."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "geomerge", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    if data.get("merges"):
        fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", sharex=True)
        for axis, suite in zip(axes, PAIRS, strict=True):
            rows = [row for key, row in data["merges"].items() if key.startswith(suite)]
            names = (
                [n for n in rows[0] if n.startswith(("global, t", "schedule", "searched", "linear"))] if rows else []
            )
            for y, name in enumerate(reversed(names)):
                gaps = 100 * np.array([row[name] - row["global t = 0.5"] for row in rows])
                axis.plot(gaps, np.full(len(gaps), y), "o", color="#9db4c8", ms=3)
                axis.plot(gaps.mean(), y, "D", color="#0b4f8a", ms=5)
            axis.axvline(0, color="#c05a1c", lw=1)
            axis.set_yticks(range(len(names)), list(reversed(names)))
            axis.set_title(suite, loc="left")
            axis.set_xlabel("points against one coefficient of 0.5")
        fig.savefig(PAGE.with_name("layer_adaptive_schedules.svg"), metadata={"Date": None})
    if data.get("synergy"):
        fig, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        for kind, colour in (("tasks", "#0b4f8a"), ("lengths", "#3b7d3b"), ("bases", "#c05a1c")):
            rows = [r for r in data["synergy"] if r["kind"] == kind]
            axis.plot([r["S"] for r in rows], [100 * r["synergy"] for r in rows], "o", color=colour, ms=4, label=kind)
        axis.axhline(0, color="#888", lw=0.8)
        axis.set_xlabel("compatibility score S")
        axis.set_ylabel("synergy, points")
        axis.legend(frameon=False, title="pairs differ in")
        fig.savefig(PAGE.with_name("layer_adaptive_synergy.svg"), metadata={"Date": None})


def write(data: Mapping[str, Any]) -> None:
    """Tables into the page between their markers, and the figures."""
    text = PAGE.read_text()
    for name, lines in (
        ("merges", merge_table(data.get("merges", {}))),
        ("synergy", correlations(data["synergy"]) if data.get("synergy") else []),
    ):
        pattern = rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL)
    PAGE.write_text(text)
    figures(data)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["merges", "synergy", "search"])
    parser.add_argument("--suites", nargs="+", default=list(PAIRS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data: dict[str, Any] = json.loads(DATA.read_text()) if DATA.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        if "search" in args.parts:
            search_course(args.trials, Path(scratch))
        if "synergy" in args.parts:
            data["synergy"] = synergy_pairs(args.seeds, Path(scratch))
        for name in args.suites if "merges" in args.parts else ():
            for seed in args.seeds:
                suite = suite_for(name, seed)
                for pair in PAIRS[name]:
                    key = f"{name} {seed}: {', '.join(pair)}"
                    data.setdefault("merges", {})[key] = merges(suite, pair, args.trials, Path(scratch))
                    print(key, {k: round(100 * v, 1) for k, v in data["merges"][key].items()}, flush=True)
                DATA.write_text(json.dumps(data, indent=1) + "\n")
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    write(data)


if __name__ == "__main__":
    main()
