"""What the methods do on real experts: every registered method on the lab's suites, written to docs/claims.md.

    make claims                                  # all suites, three seeds; builds what is not there
    python benchmarks/claims.py --suites mlp:tiny --seeds 0
    python benchmarks/claims.py --methods tsvm iso_c      # only these; the other rows stay as they were measured
    python benchmarks/claims.py --methods chains          # the steps after a method

A method runs at its defaults and on a small grid. The grid's best is chosen on the validation split and reported on the test
split. Methods for two models are compared with the others on pairs of experts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import geomerge
from geomerge.anatomy.memory_names import on_disk
from geomerge.engine.live import LiveMerge
from geomerge.lab.build import build
from geomerge.lab.suite import Suite, load_suite
from geomerge.methods import registry
from geomerge.observe import activations
from geomerge.recipe import loads

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WEIGHTS = (1.0, 0.15, 0.3, 0.5, 0.7)
DENSITIES = (0.2, 0.6)
GRID: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "slerp": {"t": (0.5, 0.3, 0.4, 0.6, 0.7)},
    # Their sums are normalised: the weights' size cancels, λ does not.
    **{name: {"lambda": (1.0, 1.5, 2.0), "density": DENSITIES} for name in ("ties", "della")},
    "layer_adaptive_slerp": {"schedule": ("S", "H", "R", "L", "H65", "H+")},
    "nuslerp": {"weight": (1.0,)},
    "nearswap": {"t": (1e-4, 1e-3, 1e-2)},
    "sce": {"select_topk": (0.1, 0.5, 1.0)},
    "karcher": {"max_iter": (10,)},
    "multislerp": {"weight": (1.0,)},
    "linear": {"weight": (1.0,)},
    "passthrough": {"scale": (1.0,)},
    "pcb": {"lambda": (1.0, 1.5), "density": (0.2, 0.05, 0.6)},
    "emr": {},
    "widen": {"score_calibration": (1.0, 0.5, 0.125)},
    "consensus": {"lambda": (0.3, 0.6, 1.0), "threshold": (0.4, 0.2)},
    "consensus_ties": {"lambda": (0.3, 0.6, 1.0), "density": (0.2, 0.6)},
    "doge_ta": {"lambda": (1.0, 2.0)},
    "lore": {},
    "wudi": {"lr": (1e-5, 1e-3)},
    "optmerge": {"mode": ("full", "lora")},
    "svd_compress": {"weight": WEIGHTS, "ratio": (0.1, 0.3)},
    **{
        name: {"lambda": (1.0, 0.3, 0.5, 1.5)}
        for name in (
            "tsvm",
            "iso_c",
            "iso_cts",
            "resm",
            "twin",
            "knots",
            "opcm",
            "iwudi",
            "swudi",
            "aswudi",
        )
    },
}
"""What each method's grid varies: the first value is its default. Others vary weight (λ) and density where they have them."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "slerp": {"t": 0.5}, "nearswap": {"t": 1e-3}, "layer_adaptive_slerp": {}, "sce": {"select_topk": 1.0}, "passthrough": {},
}  # fmt: skip
"""Settings where a method's own default does not exist."""

STATISTICS = "act.safetensors"
CHAINS: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "task_arithmetic → lines": (
        "task_arithmetic",
        [{"weight": 1.0, "steps": [{"lines": {"alpha": "auto", "beta": b}}]} for b in (0.5, 0.0, 0.25, 1.0)],
    ),
    "ties → lines": (
        "ties",
        [{"weight": 1.0, "steps": [{"lines": {"alpha": a, "beta": b}}]} for a in (0.5, 1.0) for b in (0.5, 1.0)],
    ),
    "ties → aim": (
        "ties",
        [
            {"weight": 1.0, "lambda": f, "steps": [{"aim": {"statistics": STATISTICS, "omega": o}}]}
            for f in (1.0, 2.0)
            for o in (0.4, 0.8)
        ],
    ),
}
"""Steps after a method: a row's name → the method, and the settings of its grid, the default first."""

LEFT_OUT = {
    "passthrough": "takes one model",
    "chat_vector": "is for a base that was pre-trained further",
    "tall_mask": "gives one expert back ([compress](compress.md))",
}


def settings(name: str) -> list[dict[str, Any]]:
    """The parameter settings of a method, its default first."""
    if name in CHAINS:
        return CHAINS[name][1]
    method = registry.get(name)
    known = method.parameters()
    required = {n: 1.0 for n, p in known.items() if p.required and n == "weight"}
    default = required | dict(DEFAULTS.get(name, {}))
    axes: dict[str, tuple[Any, ...]] = dict(GRID.get(name, {}))
    if not axes:
        if "weight" in known:
            axes["weight"] = WEIGHTS
        if "density" in known:
            axes["density"] = DENSITIES
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    found = [default]
    for point in points:
        merged = default | point
        if merged not in found:
            found.append(merged)
    return found


def recipe(name: str, parameters: Mapping[str, Any], experts: list[str], base: str) -> str:
    """The YAML of a merge of experts."""
    name = CHAINS[name][0] if name in CHAINS else name
    method = registry.get(name)
    given = dict(parameters)
    steps = given.pop("steps", None)
    schedule = given.pop("schedule", None)
    if "full_weights" in method.parameters():
        given["full_weights"] = True  # the suites' experts are whole, also where a method is made for adapters
    two = method.base_use == "required" and method.models == (1, 1)
    first = experts[0] if two or name == "layer_adaptive_slerp" else base
    data: dict[str, Any] = {"merge_method": name, "models": [{"model": e} for e in experts], "parameters": given}
    if method.base_use != "ignored":
        data["base_model"] = first
    if schedule:
        data["schedule"] = schedule
    if steps:
        data["steps"] = steps
    return json.dumps(data) + "\n"


class Bench:
    """A suite's experts in memory and the module that candidates are blended onto."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.tasks = {name: task for name, task in suite.tasks().items() if name in suite.experts}
        self.module = suite.load("base")
        self.live = LiveMerge(dict(suite.models), self.module)
        save_file(self.seen(), STATISTICS)
        self.own = {("test", t): self.accuracy(suite.load(t), t, "test") for t in self.tasks}
        self.base = {t: self.accuracy(suite.load("base"), t, "test") for t in self.tasks}

    def accuracy(self, module: torch.nn.Module, task: str, split: Any) -> float:
        return float(self.tasks[task].correct(module, split).mean())

    def seen(self) -> dict[str, torch.Tensor]:
        """What the base's layers see in the validation splits of all tasks."""

        class Asked(torch.nn.Module):
            def __init__(self, base: torch.nn.Module) -> None:
                super().__init__()
                self.base = base

            def forward(self, task: Any) -> None:
                task.correct(self.base, "validation")

        base = self.suite.load("base")
        found = activations(Asked(base), [(task,) for task in self.tasks.values()])
        stored = on_disk(base)
        return {stored(name.removeprefix("base.")): vector.contiguous() for name, vector in found.items()}

    def scores(self, name: str, parameters: Mapping[str, Any], experts: list[str], split: str) -> np.ndarray:
        """Blend one setting and score it on the tasks of its experts."""
        self.live.blend(loads(recipe(name, parameters, experts, "base")))
        return np.array([self.accuracy(self.module, t, split) for t in experts])


def methods(experts: int) -> Iterator[str]:
    """The methods that take so many experts, and the chains."""
    yield from CHAINS
    for name, method in sorted(registry.all_methods().items()):
        if name in LEFT_OUT:
            continue
        low, high = method.models
        beside = 1 if method.base_use == "required" and method.models == (1, 1) else 0
        if low + beside <= experts and (high is None or experts <= high + beside):
            yield name


def measure(suite: Suite, groups: list[list[str]], only: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Method → default, tuned, validation: their means over groups of experts."""
    bench = Bench(suite)
    found: dict[str, dict[str, list[float]]] = {}
    for name in methods(len(groups[0])):
        if only and name not in only and not (name in CHAINS and "chains" in only):
            continue
        rows: dict[str, list[float]] = {"default": [], "tuned": [], "normalised": []}
        chosen = []
        for group in groups:
            grid = settings(name)
            validation = [bench.scores(name, p, group, "validation").mean() for p in grid]
            best = grid[int(np.argmax(validation))]
            default = bench.scores(name, grid[0], group, "test")
            tuned = default if best == grid[0] else bench.scores(name, best, group, "test")
            rows["default"].append(float(default.mean()))
            rows["tuned"].append(float(tuned.mean()))
            rows["normalised"].append(float(np.mean(tuned / [bench.own["test", t] for t in group])))
            chosen.append(best)
        found[name] = {key: [float(np.mean(values))] for key, values in rows.items()} | {"chosen": chosen}  # type: ignore[dict-item]
    members = sorted({e for g in groups for e in g})
    single = {e: [bench.accuracy(suite.load(e), t, "test") for t in members] for e in members}
    found["(base)"] = {"default": [float(np.mean([bench.base[t] for t in members]))]}
    found["(best single expert)"] = {"default": [max(float(np.mean(row)) for row in single.values())]}
    found["(each task by its own expert)"] = {"default": [float(np.mean([bench.own["test", t] for t in members]))]}
    return found


def joined(parts: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, list[float]]]:
    """The same methods' numbers over seeds, side by side."""
    out: dict[str, dict[str, list[float]]] = {}
    for name in parts[0]:
        out[name] = {key: [x for part in parts for x in part[name].get(key, [])] for key in parts[0][name]}
    return out


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % t interval over seeds, in per cent."""
    from scipy import stats

    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:.1f} ± {half:.1f}"


def table(rows: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """A markdown table, best tuned method first, references on top."""
    lines = ["| method | default | best of grid | share of the own experts | most chosen |", "|---|---|---|---|---|"]
    order = sorted(rows, key=lambda n: (not n.startswith("("), -np.mean(rows[n].get("tuned", rows[n]["default"]))))
    for name in order:
        row = rows[name]
        if name.startswith("("):
            lines.append(f"| *{name[1:-1]}* | {interval(row['default'])} | | | |")
            continue
        texts = [said(c) for c in row["chosen"]]
        most = max(texts, key=texts.count) or "defaults"
        lines.append(
            f"| {name} | {interval(row['default'])} | {interval(row['tuned'])} | {interval(row['normalised'])} | {most} |"
        )
    return lines


def said(setting: Mapping[str, Any]) -> str:
    """A setting in a cell: of a chain what its steps say."""
    shown = {k: v for k, v in setting.items() if k not in ("steps", "weight")} if "steps" in setting else dict(setting)
    for step in setting.get("steps", []):
        shown |= {k: v for values in step.values() for k, v in values.items() if k != "statistics"}
    return json.dumps(shown).replace('"', "").strip("{}")


LADDER = {
    "linear": (65.8, 79.6, 66.5), "task_arithmetic": (69.1, 84.5, 68.0), "ties": (72.4, 86.0, 72.2),
    "consensus": (73.6, 85.2, None), "pcb": (76.3, 87.5, None), "tsvm": None, "iso_c": (None, None, 82.8),
    "iso_cts": (None, None, 82.7), "wudi": (85.2, 92.6, 84.5), "swudi": (None, None, 85.6), "aswudi": (None, None, 85.5),
}  # fmt: skip
"""Published accuracies on eight image tasks, per cent: CLIP ViT-B/32 and L/14 (WUDI's repository), and B/32 of FusionBench's
checkpoints, whose average is another."""


def ladder(results: Mapping[str, Any]) -> list[str]:
    """The published accuracies beside those of the best of the grid here, each with what it is above averaging."""
    suites = {key.split(":")[0]: rows for key, rows in results.items() if ": all" in key}
    names = ["ViT-B/32", "ViT-L/14", "ViT-B/32, FusionBench", *suites]
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]

    def cell(value: float | None, average: float) -> str:
        return "" if value is None else f"{value:.1f} ({value - average:+.1f})"

    for method, published in LADDER.items():
        cells = [cell(v, a) for v, a in zip(published or (None, None, None), LADDER["linear"] or (), strict=True)]
        for rows in suites.values():
            mean = {n: 100 * float(np.mean(rows[n]["tuned"])) for n in ("linear", method) if n in rows}
            cells.append(cell(mean.get(method), mean["linear"]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def figure(results: Mapping[str, Any], path: Path) -> None:
    """Every method's tuned accuracy against plain averaging's, a panel for each suite."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "geomerge", "font.size": 8}
    down = math.ceil(len(results) / 2)
    most = max(map(len, results.values()))
    fig, axes = plt.subplots(down, 2, figsize=(8.6, down * 0.15 * most + 0.6), squeeze=False, layout="constrained")
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, (title, rows) in zip(axes.flat, results.items(), strict=False):
        names = sorted((n for n in rows if not n.startswith("(")), key=lambda n: np.mean(rows[n]["tuned"]))
        for y, name in enumerate(names):
            values = 100 * np.array(rows[name]["tuned"])
            (seeds,) = axis.plot([values.min(), values.max()], [y, y], color="#9db4c8", lw=2.5, solid_capstyle="round")
            (mean,) = axis.plot(values.mean(), y, "o", color="#0b4f8a", ms=4)
        averaging = axis.axvline(100 * np.mean(rows["linear"]["tuned"]), color="#c05a1c", lw=1, ls="--")
        own = axis.axvline(100 * np.mean(rows["(each task by its own expert)"]["default"]), color="#3b7d3b", lw=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-1, len(names))
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("mean accuracy, %")
        axis.spines[["top", "right"]].set_visible(False)
    said = {"from the least to the largest seed": seeds, "their mean": mean, "averaging": averaging, "own experts": own}
    fig.legend(said.values(), said.keys(), loc="outside upper center", ncols=4, frameon=False)
    fig.savefig(path, metadata={"Date": None})


def suite_for(name: str, seed: int) -> Suite:
    """A built suite, building it when it is not there."""
    try:
        return load_suite(f"{name}:{seed}")
    except geomerge.UsageError:
        return build(*name.split(":"), seed)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["mlp:tiny", "mlp:hard", "glyphs:tiny", "skills:tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        claims(args)


def claims(args: argparse.Namespace) -> None:
    """Measure the suites, in a working directory for what lies between."""
    file = DOCS / "claims.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in args.suites:
        title = name.removesuffix(":tiny").replace(":", ", ")
        whole, pairs = [], []
        for seed in args.seeds:
            begun = time.perf_counter()
            suite = suite_for(name, seed)
            experts = list(suite.experts)
            whole.append(measure(suite, [experts], args.methods))
            two = [[experts[i], experts[(i + 1) % len(experts)]] for i in range(0, len(experts), 2)][:2]
            pairs.append(measure(suite, two, args.methods))
            print(f"{name} seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
        # Another run may have written meanwhile: what it measured stays.
        results = json.loads(file.read_text()) if file.exists() else {}
        for key, parts in ((f"{title}: all {len(experts)} experts", whole), (f"{title}: pairs of experts", pairs)):
            results[key] = (results.get(key, {}) if args.methods else {}) | joined(parts)
        file.write_text(json.dumps(results, indent=1) + "\n")
    write(results)


def write(results: Mapping[str, Any]) -> None:
    """The tables into docs/claims.md between their markers, and the figure."""
    left = "; ".join(f"`{name}` {reason}" for name, reason in LEFT_OUT.items())
    lines = [f"Left out: {left}.", ""]
    lines += ["### Beside the published ladder", "", *ladder(results), ""]
    for title, rows in results.items():
        lines += [f"### {title}", "", *table(rows), ""]
    page = DOCS / "claims.md"
    pattern = re.compile(r"(<!-- claims:start -->\n).*?(<!-- claims:end -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda m: m[1] + "\n".join(lines) + m[2], page.read_text()))
    figure({k: v for k, v in results.items() if "all" in k}, DOCS / "claims.svg")


if __name__ == "__main__":
    main()
