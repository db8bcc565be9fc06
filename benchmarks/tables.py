"""Writes the benchmark's tables from docs/benchmarks.json into docs/benchmarks.md and README.md, between their markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MUST = {"linear": 1.5, "slerp": 1.5, "ties": 5.0}
ELEMENTWISE = (
    *("dare_ties", "breadcrumbs", "della", "sce", "arcee_fusion", "nearswap", "ram", "tall_mask", "consensus", "widen"),
    *("dare_linear", "della_linear", "breadcrumbs_ties", "ramplus_tl", "multislerp", "nuslerp"),
)
SURVEYED = ("pcb", "emr", "ties_global", "consensus_ties")
"""Methods that look at the whole model before the first tensor is made."""
PROCESS = dict.fromkeys(ELEMENTWISE, 6.0) | dict.fromkeys(SURVEYED, 12.0)
"""What the whole process may take, as a multiple of `cp` of the output."""
PEERS = (
    *("dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion"),
    *("nearswap", "ram", "ramplus_tl"),
)
"""Elementwise methods that the peer has, too."""
SHOWN = ("slerp", "ties", "dare_ties", "linear", "della")
"""What the README shows beside the peer."""
FASTER = {"slerp": 5.0, "ties": 20.0, "dare_ties": 10.0} | dict.fromkeys(PEERS, 15.0)


def write(root: Path) -> None:
    """Rewrite the tables."""
    data = json.loads((root / "docs" / "benchmarks.json").read_text())
    rows: list[dict[str, Any]] = data["rows"]
    for name, text in (
        ("docs/benchmarks.md", full(rows, data["machine"])),
        ("README.md", short(rows, data["machine"])),
    ):
        path = root / name
        before = path.read_text()
        pattern = re.compile(r"(<!-- bench:start -->\n).*?(<!-- bench:end -->)", re.DOTALL)
        if not pattern.search(before):
            raise SystemExit(f"{name} has no <!-- bench:start --> … <!-- bench:end -->")
        path.write_text(pattern.sub(lambda m, t=text: m[1] + t + m[2], before))
    picture(root)


def of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind."""
    return [r for r in rows if r["kind"] == kind]


def full(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """All tables."""
    lines = [
        f"Measured {machine['date']} on {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}.",
        "",
    ]
    for r in of(rows, "floor"):
        lines += [
            (
                f"Floor: one core reads {r['read']:.1f} GB/s out of the page cache and writes {r['write']:.1f} GB/s into it "
                "(allocated beforehand)."
            ),
            "",
        ]
    lines += [
        "| merge | `cp` s | engine s | process s | engine / `cp`, median | best / best | must |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in of(rows, "engine"):
        must = f"≤ {MUST[r['method']]}" if r["method"] in MUST else ""
        if r["method"] in PROCESS:
            must = f"process ≤ {PROCESS[r['method']]:g} × `cp`: {r['process'] / r['cp']:.1f}"
        lines.append(
            f"| {r['method']} {r['size']} | {r['cp']:.2f} | {r['engine']:.2f} | {r['process']:.2f} | {r['ratio']:.2f} "
            f"| {r['best']:.2f} | {must} |"
        )
    lines += ["", "| as a process | geomerge s | mergekit 0.1.5 s | times faster | must |", "|---|---|---|---|---|"]
    for r in of(rows, "peer"):
        peer, faster = (f"{r['peer']:.1f}", f"{r['faster']:.1f}") if r["peer"] else ("absent", "")
        must = f"≥ {FASTER[r['method']]:.0f}" if r["method"] in FASTER else ""
        lines.append(f"| {r['method']} {r['size']} | {r['process']:.2f} | {peer} | {faster} | {must} |")
    lines += ["", "| method | size | anonymous memory above `import torch`, MB (must: ≤ 150) |", "|---|---|---|"]
    lines += [f"| {r['method']} | {r['size']} | {r['peak']:.0f} |" for r in of(rows, "memory")]
    lines += ["", "| method | correctly rounded to bfloat16 | largest error, ulp | elements |", "|---|---|---|---|"]
    lines += [
        f"| {r['method']} | {100 * r['exact']:.4f} % | {r['ulps']} | {r['elements']:,} |" for r in of(rows, "accuracy")
    ]
    lines += [""]
    lines += [f"* {r['what']}: {r['process']:.2f} s (must: ≤ 30 s)" for r in of(rows, "many")]
    lines += [f"* `{r['what']}`: {r['process']:.2f} s (must: ≤ 0.3 s)" for r in of(rows, "help")]
    for r in of(rows, "diagnose"):
        lines.append(
            f"* diagnosis of a pair, {r['size']}: {r['process']:.2f} s, {r['ratio']:.2f} of its merge by SLERP as a process "
            f"(must: ≤ 1.5); {r['peak']:.0f} MB above `import torch`"
        )
    lines += [
        f"* SLERP against averaging, engine, {r['size']}: {r['ratio']:.2f} (the paper measured 1.6 to 1.7)"
        for r in of(rows, "sphere")
    ]
    lines += [
        f"* {r['what']} on two skills: {1000 * r['blend']:.0f} ms to blend, {1000 * r['score']:.0f} ms to score"
        for r in of(rows, "search")
    ]
    return "\n".join(lines) + "\n"


def short(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| whole process, two cores | geomerge | mergekit 0.1.5 | times faster |",
        "|---|---|---|---|",
    ]
    for r in (r for r in of(rows, "peer") if r["method"] in SHOWN):
        peer, faster = (f"{r['peer']:.1f} s", f"**{r['faster']:.0f}×**") if r["peer"] else ("absent", "")
        lines.append(f"| {r['method']}, {r['size']} | {r['process']:.1f} s | {peer} | {faster} |")
    peak = max((r["peak"] for r in of(rows, "memory")), default=None)
    lines += ["", (f"bfloat16 models, warm page cache, {machine['date']}, `make bench`; "
              f"all figures in [docs/benchmarks.md](docs/benchmarks.md).")]  # fmt: skip
    if peak is not None:
        said = "less than `import torch` alone takes" if peak < 0 else f"at most {peak:.0f} MB above `import torch`"
        lines += [f"Peak anonymous memory: {said} (nine methods, 0.5B and 1.5B alike)."]
    return "\n".join(lines) + "\n"


def picture(root: Path) -> None:
    """Draw whole-process times beside the peer's as docs/benchmarks.svg, on white."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    found = json.loads((root / "docs" / "benchmarks.json").read_text())["rows"]
    rows = [r for r in of(found, "peer") if r["peer"] and r["method"] in SHOWN]
    if not rows:
        return
    mpl.rcParams.update({"svg.hashsalt": "geomerge", "font.size": 11, "text.color": "#57606a"})
    figure, axes = plt.subplots(figsize=(7.2, 0.75 * len(rows) + 0.7))
    for place, r in enumerate(reversed(rows)):
        axes.barh(place + 0.19, r["peer"], 0.34, color="#9aa4af")
        axes.barh(place - 0.19, r["process"], 0.34, color="#1f7a8c")
        axes.text(r["peer"], place + 0.19, f" mergekit 0.1.5: {r['peer']:.0f} s", va="center")
        axes.text(r["process"], place - 0.19, f" geomerge: {r['process']:.1f} s", va="center", weight="bold")
    axes.set_yticks(range(len(rows)), [f"{r['method']}\n{r['size']}" for r in reversed(rows)])
    axes.set_xlim(0, max(r["peer"] for r in rows) * 1.35)
    axes.tick_params(colors="#57606a", length=0, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(root / "docs" / "benchmarks.svg", metadata={"Date": None})
    plt.close(figure)
