"""The benchmark: geomerge beside `cp` and beside mergekit, on the same files in one run.

    make bench                                         # everything, several minutes
    python benchmarks/run.py --peer /path/to/peer/bin/mergekit-yaml --only engine

Needs about 20 GB of disk below ``.bench`` and enough memory to hold the models of one size in the page cache. The peer is
looked for in ``.bench/peer`` (``tests/peer/build_peer.sh .bench/peer`` makes it) and reported as absent otherwise. Figures are
medians; a ratio always compares runs that alternate. Results go to ``docs/benchmarks.json`` and, as tables, into
``docs/benchmarks.md`` and the README between their markers.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import models
from tables import PEERS, PROCESS, SURVEYED

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
PYTHON = sys.executable
MASKED = ("tall_mask", "consensus")
CLOSE = ("sce", "arcee_fusion", "nearswap")
"""Of the peer's methods those that take it seconds, not minutes, and are to be measured more than once."""


def recipe(method: str, size: str) -> str:
    """The YAML of one benchmark, read alike by both tools."""
    folder = BENCH / size
    task = {"weight": 1.0, "density": 0.5} if method == "ties" else {"weight": 0.5, "density": 0.5}
    if method == "linear":
        entries = [(name, {"weight": 0.5}) for name in ("a", "b")]
    elif method == "slerp":
        entries = [("base", {}), ("a", {})]
    else:
        keys = ("weight",) if method == "task_arithmetic" else ("weight", "density")
        entries = [(name, {k: task[k] for k in keys}) for name in ("a", "b", "c")]
    if method in ("model_stock", "sce", "ram", "ramplus_tl", "karcher", "widen", *SURVEYED, *MASKED):
        entries = [(name, {}) for name, _ in entries]
    if method in ("nearswap", "arcee_fusion"):
        entries = [("base", {}), ("a", {})]
    if method in ("nuslerp", "multislerp"):
        entries = [(name, {"weight": 0.5}) for name in ("a", "b")]
    if method == "passthrough":
        entries = [("a", {})]
    if method == "ties_global":
        entries = [(name, {"weight": 1.0, "density": 0.2}) for name in ("a", "b", "c")]
    lines = [f"merge_method: {method.removesuffix('_global')}", "dtype: bfloat16", "models:"]
    for name, parameters in entries:
        lines.append(f"  - model: {folder / name}")
        if parameters:
            lines.append(f"    parameters: {json.dumps(parameters)}")
    if method not in ("linear", "nuslerp", "multislerp", "karcher", "passthrough"):
        lines.append(f"base_model: {folder / 'base'}")
    if method in ("slerp", "nearswap"):
        lines.append(f"parameters: {{t: {0.3 if method == 'slerp' else 0.0001}}}")
    if method == "ties_global":
        lines.append("parameters: {scope: global}")
    if method in ("emr", "tall_mask"):
        lines.append("parameters: {task: 2}")
    return "\n".join(lines) + "\n"


class Bench:
    """Runs commands with all inputs in the page cache and keeps the figures."""

    def __init__(self, runs: int, peer: Path | None) -> None:
        self.runs, self.peer = runs, peer
        self.out = BENCH / "out"

    def add(self, what: str, **figures: Any) -> None:
        """Keep and show one row."""
        row = {"what": what, **figures}
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
        print(f"{what}: {shown}", flush=True)
        write([row])

    def clear(self) -> None:
        """Remove what a run left."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.out.with_name("out.partial"), ignore_errors=True)

    def warm(self, size: str) -> None:
        """Bring the inputs into the page cache again: systems that reclaim cold pages take them out between runs."""
        buffer = bytearray(1 << 20)
        for path in sorted((BENCH / size).glob("*/model.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def timed(self, command: list[str], size: str | None = None) -> tuple[float, str]:
        """Wall seconds of a process, and what it printed."""
        self.clear()
        if size is not None:
            self.warm(size)
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet())
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return seconds, done.stdout

    def copy(self, size: str) -> float:
        """Wall seconds of `cp` of one model's weights."""
        self.clear()
        self.out.mkdir(parents=True)
        self.warm(size)
        begun = time.perf_counter()
        subprocess.run(["cp", str(BENCH / size / "a" / "model.safetensors"), str(self.out)], check=True)
        return time.perf_counter() - begun

    def merge(self, method: str, size: str) -> dict[str, float]:
        """One merge as a process: its wall seconds, and the engine's own."""
        path = BENCH / f"{method}-{size}.yml"
        path.write_text(recipe(method, size))
        seconds, text = self.timed(
            [PYTHON, "-m", "geomerge", "merge", str(path), str(self.out), "--quiet", "--json"], size
        )
        return {"process": seconds, "engine": float(json.loads(text)["seconds"])}

    def peer_merge(self, method: str, size: str) -> float:
        """One merge by the peer as a process: wall seconds."""
        path = BENCH / f"{method}-{size}.yml"
        path.write_text(recipe(method, size))
        command = [str(self.peer), str(path), str(self.out), "--no-write-model-card", "--no-copy-tokenizer"]
        return self.timed(command, size)[0]

    # -- the questions -------------------------------------------------------------------------------------------------

    def engine(self, method: str, size: str) -> None:
        """Engine time against `cp` of the output, run by run."""
        copies, engines, processes = [], [], []
        for _ in range(self.runs):
            copies.append(self.copy(size))
            found = self.merge(method, size)
            engines.append(found["engine"])
            processes.append(found["process"])
        ratio = statistics.median(e / c for e, c in zip(engines, copies, strict=True))
        median = statistics.median
        self.add(
            f"{method} {size}", kind="engine", method=method, size=size, cp=median(copies), engine=median(engines),
            process=median(processes), ratio=ratio, best=min(engines) / min(copies),
        )  # fmt: skip

    def ratios(self, size: str, methods: Sequence[str]) -> None:
        """Engine and process over `cp`, the methods taking turns: medians and quartiles, shown and not kept."""
        copies: list[float] = []
        runs: dict[str, list[tuple[float, float, float]]] = {method: [] for method in methods}
        for _ in range(self.runs):
            for method, found in runs.items():
                copies.append(self.copy(size))
                merged = self.merge(method, size)
                found.append((merged["engine"] / copies[-1], merged["process"] / copies[-1], merged["process"]))
        low, middle, high = statistics.quantiles(copies, n=4)
        print(f"cp {middle:.2f} s, quartiles {low:.2f} to {high:.2f}")
        for method, found in runs.items():
            engines, processes, seconds = zip(*found, strict=True)
            low, middle, high = statistics.quantiles(engines, n=4)
            print(
                f"{method:18s}engine {middle:.2f} x cp, quartiles {low:.2f} to {high:.2f}; "
                f"process {statistics.median(processes):.2f} x cp, {statistics.median(seconds):.2f} s"
            )

    def against_peer(self, method: str, size: str, peer_runs: int) -> None:
        """Process time against the peer's, in turns; the peer's slow methods only once."""
        ours, theirs = [], []
        for run in range(self.runs):
            ours.append(self.merge(method, size)["process"])
            if self.peer is not None and run < peer_runs:
                theirs.append(self.peer_merge(method, size))
        mine = statistics.median(ours)
        his = statistics.median(theirs) if theirs else None
        self.add(
            f"{method} {size} as a process", kind="peer", method=method, size=size, process=mine, peer=his,
            **({"faster": his / mine} if his is not None else {}),
        )  # fmt: skip

    def memory(self, method: str, size: str) -> None:
        """Peak anonymous memory above that of `import torch`."""
        self.clear()
        path = BENCH / f"{method}-{size}.yml"
        path.write_text(recipe(method, size))
        command = [PYTHON, "-m", "geomerge", "merge", str(path), str(self.out), "--quiet", "--json"]
        peak = peak_anonymous(command)
        torch_only = peak_anonymous([PYTHON, "-c", "import torch, time; torch.zeros(8) + 1; time.sleep(0.3)"])
        self.add(f"memory of {method} {size}", kind="memory", method=method, size=size, peak=peak - torch_only)

    def diagnose(self, size: str) -> None:
        """Diagnosis of a pair against its merge by SLERP, both as processes, and its memory."""
        pair = [str(BENCH / size / name) for name in ("base", "a")]
        command = [PYTHON, "-m", "geomerge", "diagnose", *pair, "--quiet", "--json"]
        ratios, seconds = [], []
        for _ in range(self.runs):
            merged = self.merge("slerp", size)["process"]
            seconds.append(self.timed(command, size)[0])
            ratios.append(seconds[-1] / merged)
        torch_only = peak_anonymous([PYTHON, "-c", "import torch, time; torch.zeros(8) + 1; time.sleep(0.3)"])
        self.add(
            f"diagnose {size}", kind="diagnose", size=size, process=statistics.median(seconds),
            ratio=statistics.median(ratios), peak=peak_anonymous(command) - torch_only,
        )  # fmt: skip

    def sphere(self, size: str) -> None:
        """SLERP against averaging, engine time, run by run: the paper measured 1.6 to 1.7."""
        ratios = [self.merge("slerp", size)["engine"] / self.merge("linear", size)["engine"] for _ in range(self.runs)]
        self.add(f"slerp / linear {size}", kind="sphere", size=size, ratio=statistics.median(ratios))

    def search(self) -> None:
        """What a candidate of a search costs: blending it, and scoring it on two tasks of the skills suite."""
        folder = BENCH / "search"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        experts = ROOT / "src" / "geomerge" / "lab" / "shipped" / "skills-tiny" / "experts"
        study = folder / "study.yml"
        study.write_text(
            f"parents: [{experts / 'choice'}, {experts / 'recall'}]\n"
            "objective: {tasks: [skills/choice, skills/recall]}\nbudget: 12\n"
        )
        found = folder / "found"
        self.timed([PYTHON, "-m", "geomerge", "search", str(study), "--out", str(found), "--quiet"])
        trials = json.loads((found / "search.json").read_text())["trials"]
        blend, score = (statistics.median(t[key] for t in trials) for key in ("blend", "score"))
        shutil.rmtree(folder)
        self.add("a candidate of a search", kind="search", blend=blend, score=score)

    def many(self) -> None:
        """100,000 tensors of four elements."""
        folder = BENCH / "many-100000"
        path = BENCH / "many.yml"
        entries = "".join(f"  - {{model: {folder / n}, parameters: {{weight: 0.5}}}}\n" for n in ("a", "b"))
        path.write_text(f"merge_method: linear\nmodels:\n{entries}")
        command = [PYTHON, "-m", "geomerge", "merge", str(path), str(self.out), "--quiet", "--json"]
        seconds = statistics.median(self.timed(command)[0] for _ in range(self.runs))
        self.add("100,000 tensors of 4 elements, linear, 2 models", kind="many", process=seconds)

    def help(self) -> None:
        """Start-up."""
        runs = [self.timed([PYTHON, "-m", "geomerge", "--help"])[0] for _ in range(2 * self.runs)]
        self.add("geomerge --help", kind="help", process=statistics.median(runs))

    def floor(self) -> None:
        """The machine's bandwidth into and out of the page cache, one thread."""
        source = BENCH / "0.5B" / "a" / "model.safetensors"
        size = source.stat().st_size
        view = memoryview(mmap.mmap(-1, 1 << 20))  # of whole pages: see docs/benchmarks.md on where copies begin
        reads, writes = [], []
        for _ in range(self.runs):
            begun = time.perf_counter()
            with source.open("rb", buffering=0) as file:
                while file.readinto(view):
                    pass
            reads.append(size / (time.perf_counter() - begun))
            target = BENCH / "floor.bin"
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            begun = time.perf_counter()
            os.posix_fallocate(descriptor, 0, size)
            for offset in range(0, size, len(view)):
                os.pwrite(descriptor, view[: min(len(view), size - offset)], offset)
            writes.append(size / (time.perf_counter() - begun))
            os.close(descriptor)
            target.unlink()
        self.add("floor", kind="floor", read=statistics.median(reads) / 1e9, write=statistics.median(writes) / 1e9)


def quiet() -> dict[str, str]:
    """The environment of all runs: offline, without telemetry, importing this checkout, byte-compiled as if installed."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT / "src")}


def peak_anonymous(command: list[str]) -> float:
    """Peak anonymous memory in MB of a process and its children, what they share counted once; sampled."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet())
    peak = 0
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            family = [str(process.pid), *children.read_text().split()]
        except OSError:
            break
        peak = max(peak, sum(anonymous(pid) for pid in family))
        time.sleep(0.01)
    return peak / 1024


def anonymous(pid: str) -> int:
    """A process's share of anonymous pages in kB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))


def machine() -> dict[str, Any]:
    """What the figures were measured on, in kind."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m"),
    }  # fmt: skip


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", type=Path, default=BENCH / "peer" / "bin" / "mergekit-yaml")
    parser.add_argument(
        "--only", choices=["engine", "ratios", "peer", "memory", "many", "accuracy", "geometry", "all"], default="all"
    )
    parser.add_argument("--sizes", nargs="*", default=["0.5B", "1.5B"])
    parser.add_argument("--methods", nargs="*", help="of the engine's rows, the ratios and those beside mergekit")
    args = parser.parse_args()
    bench = Bench(args.runs, args.peer if args.peer.exists() else None)
    for size in args.sizes:
        models.make(BENCH, size)
    if args.only in ("many", "all"):
        models.make_many(BENCH)

    def wanted(part: str) -> bool:
        return args.only in (part, "all")

    def asked(method: str) -> bool:
        return args.methods is None or method in args.methods

    if wanted("engine"):
        bench.floor()
        for size in args.sizes:
            for method in filter(asked, ("linear", "slerp", "ties", "dare_ties", "task_arithmetic")):
                bench.engine(method, size)
        bench.runs = min(args.runs, 3)
        for method in filter(
            asked, ("model_stock", "karcher", "passthrough", *(m for m in PROCESS if m != "dare_ties"))
        ):
            bench.engine(method, args.sizes[0])
    bench.runs = args.runs
    if args.only == "ratios":
        bench.ratios(args.sizes[0], list(filter(asked, ("linear", "slerp", "ties", *PROCESS))))
    if wanted("geometry"):
        bench.search()
        for size in args.sizes:
            bench.diagnose(size)
            bench.sphere(size)
    if wanted("memory"):
        for method in (
            "linear",
            "slerp",
            "ties",
            "dare_ties",
            "della",
            "sce",
            "arcee_fusion",
            "karcher",
            "breadcrumbs_ties",
        ):
            for size in args.sizes:
                bench.memory(method, size)
    if wanted("many"):
        bench.many()
        bench.help()
    if wanted("accuracy"):
        import accuracy

        for row in accuracy.measure(BENCH / args.sizes[0]):
            bench.add(**row)
    if wanted("peer"):
        for method, size, runs in (
            ("slerp", "1.5B", 3),
            ("ties", "0.5B", 1),
            ("dare_ties", "0.5B", 1),
            ("linear", "0.5B", 3),
            *((method, "0.5B", 3 if method in CLOSE else 1) for method in PEERS),
        ):
            if size in args.sizes and asked(method):
                bench.against_peer(method, size, runs)
    bench.clear()


def write(rows: list[dict[str, Any]]) -> None:
    """Merge the rows into docs/benchmarks.json and write the tables."""
    path = ROOT / "docs" / "benchmarks.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {row["what"]: row for row in before} | {row["what"]: row for row in rows}
    path.write_text(json.dumps({"machine": machine(), "rows": list(known.values())}, indent=1) + "\n")
    import tables

    tables.write(ROOT)


if __name__ == "__main__":
    main()
