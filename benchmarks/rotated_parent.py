"""A rotated parent: what SLERP makes of it as it is, and with its basis aligned; table and figure of docs/align.md.

python benchmarks/rotated_parent.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import geomerge as gm
from geomerge.lab.suite import load_suite

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "align"))

from planted import rotate  # noqa: E402 - the tests' own rotation

PAIRS = (("choice", "recall"), ("instruction", "arithmetic"), ("reasoning", "story"))
MERGES = {
    "unrotated": "",
    "rotated, as it is": "",
    "align: embedding": "align: embedding",
    "align: residual": "align: residual",
}


def recipe(a: Path | str, b: Path | str, more: str) -> str:
    """The middle of two models."""
    return (
        f"merge_method: slerp\nbase_model: {a}\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{t: 0.5}}\n"
        f"dtype: float32\nguardrails: off\n{more}\n"
    )


def main() -> None:
    """Measure and write the table."""
    suite = load_suite("skills")
    names = list(MERGES)
    bars: dict[str, list[float]] = {}
    lines = [
        f"| pair (second one rotated) | mean angle before → after | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for first, second in PAIRS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            a, b = Path(suite.experts[first]), Path(suite.experts[second])
            turned = rotate(b, folder / "turned")
            for name, more in MERGES.items():
                gm.merge(recipe(a, b if name == "unrotated" else turned, more), folder / name)
            scores = gm.evaluate([str(folder / n) for n in names], f"skills/{first},skills/{second}")
            found = gm.plan(recipe(a, turned, "align: residual")).alignment[0]["omega_bar"]
            means = [100 * sum(scores.value(n, t.name) for t in scores.tasks) / len(scores.tasks) for n in names]
        bars[f"{first}, {second}"] = means
        cells = " | ".join(f"{m:.1f}" for m in means)
        lines.append(f"| {first}, {second} | {found['before']:.2f} → {found['after']:.2f} | {cells} |")
        print(lines[-1], flush=True)
    page = ROOT / "docs" / "align.md"
    text = re.sub(
        r"(<!-- rotated:start -->\n).*?(<!-- rotated:end -->)",
        lambda m: m[1] + "\n".join(lines) + "\n\n(Accuracy in per cent, mean over the two parents' tasks.)\n" + m[2],
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)
    draw(bars, names)


def draw(bars: dict[str, list[float]], names: list[str]) -> None:
    """A group of bars for each pair."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "geomerge", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axis = plt.subplots(figsize=(7.0, 2.8), layout="constrained")
    for k, (name, colour) in enumerate(zip(names, ("#9db4c8", "#c05a1c", "#d8a47f", "#0b4f8a"), strict=True)):
        axis.bar([i + 0.2 * k for i in range(len(bars))], [m[k] for m in bars.values()], 0.18, color=colour, label=name)
    axis.set_xticks([i + 0.3 for i in range(len(bars))], list(bars))
    axis.set_ylabel("accuracy on both tasks, %")
    axis.legend(frameon=False, ncols=2, loc="upper left")
    figure.savefig(ROOT / "docs" / "rotated_parent.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
