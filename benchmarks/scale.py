"""What a merge of 405 billion and of a trillion parameters takes: plans made in earnest, runs simulated with measured costs.

    python benchmarks/scale.py [--dir DIR]

Makes three shape-only checkpoints of each size (real headers and indexes, data that is a hole in the file), plans a merge of
them, divides the plan among machines as `geomerge merge --shard i/n` does, and plays the division through: each machine's
tensors on its cores in the order that the engine takes them, at the cost for each tensor that is measured here on real ones.
Time spent on disk and network follows from the bytes and the rates below. Writes docs/scale.json and docs/scale.md's tables.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import geomerge as gm
from geomerge.checkpoint.layout import DEFAULT_SHARD_SIZE, plan_layout
from geomerge.checkpoint.writer import OutputDirectory
from geomerge.engine.build import Builder
from geomerge.engine.execute import Work, bundles
from geomerge.engine.plan import Node, Plan
from geomerge.engine.run import layout_of, open_inputs
from geomerge.engine.shards import divide
from geomerge.engine.sinks import FileSink

ROOT = Path(__file__).parents[1]
Shapes = Iterator[tuple[str, tuple[int, ...]]]

CORES = 16
"""Of each machine; assumed as fast as the one that this runs on."""
DISK_READ, DISK_WRITE = 5.0, 2.5
"""GB/s of a machine's own NVMe disk: the case of one machine."""
LINK = 3.1
"""GB/s of each machine's network (25 Gbit/s), in each direction."""
SERVER_READ, SERVER_WRITE = 100.0, 50.0
"""GB/s of the shared file system, all machines together."""
MACHINES = (1, 16, 256)
METHODS = {"linear": "", "ties": "parameters: {density: 0.5}\n"}
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 23)


def llama_405b() -> Shapes:
    """Llama 3.1 405B."""
    h, m, v, kv = 16384, 53248, 128256, 1024
    yield "model.embed_tokens.weight", (v, h)
    for i in range(126):
        b = f"model.layers.{i}"
        yield f"{b}.input_layernorm.weight", (h,)
        for name, shape in (("q", (h, h)), ("k", (kv, h)), ("v", (kv, h)), ("o", (h, h))):
            yield f"{b}.self_attn.{name}_proj.weight", shape
        yield f"{b}.post_attention_layernorm.weight", (h,)
        for name, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
            yield f"{b}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (v, h)


def moe_1t() -> Shapes:
    """A mixture of experts of a trillion parameters whose experts are stored apart: 100,000 tensors."""
    h, m, v, experts = 7168, 1408, 160000, 555
    yield "model.embed_tokens.weight", (v, h)
    for i in range(60):
        b = f"model.layers.{i}"
        yield f"{b}.input_layernorm.weight", (h,)
        for name, shape in (("q", (h, h)), ("k", (h // 8, h)), ("v", (h // 8, h)), ("o", (h, h))):
            yield f"{b}.self_attn.{name}_proj.weight", shape
        yield f"{b}.post_attention_layernorm.weight", (h,)
        yield f"{b}.mlp.gate.weight", (experts, h)
        for e in range(experts):
            for name, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
                yield f"{b}.mlp.experts.{e}.{name}_proj.weight", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (v, h)


MODELS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "405B": (llama_405b, {"model_type": "llama", "num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 128256}),
    "1T MoE": (
        moe_1t,
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 60,
            "num_experts": 555,
            "hidden_size": 7168,
            "vocab_size": 160000,
        },
    ),
}

PLAN = """
import json, resource, sys, time
import geomerge as gm
import geomerge.api
begun, used = time.perf_counter(), time.process_time()
plan = gm.plan(sys.argv[1])
seconds, cpu = time.perf_counter() - begun, time.process_time() - used
peak = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1e3
plan.save(sys.argv[2])
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": peak, "tensors": len(plan.outputs)}))
"""


def hollow(folder: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """Write a checkpoint whose headers are real and whose data is a hole: of any size, on any disk."""
    folder.mkdir(parents=True)
    layout = plan_layout([(name, "BF16", shape) for name, shape in shapes])
    for file in layout.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.size)
    (folder / "model.safetensors.index.json").write_text(json.dumps(layout.index()))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, "dtype": "bfloat16"}))


def recipe(root: Path, method: str) -> Path:
    """A merge of a and b, over base where the method has one."""
    weights = "".join(f"- {{model: {root}/{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
    base = "" if method == "linear" else f"base_model: {root}/base\n"
    path = root / f"{method}.yml"
    path.write_text(f"merge_method: {method}\n{base}models:\n{weights}{METHODS[method]}dtype: bfloat16\n")
    return path


def planned(root: Path, method: str) -> tuple[dict[str, float], Plan]:
    """Plan in a process of its own: seconds, processor seconds, the process's largest memory with all libraries."""
    saved = root / f"{method}.plan.json"
    words = [sys.executable, "-c", PLAN, str(recipe(root, method)), str(saved)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), Plan.load(saved)


def measured(root: Path, method: str) -> list[tuple[int, float]]:
    """Processor seconds that one core takes for a tensor of some sizes, reading and writing through the page cache."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"t.{i}.{n}": (n // 256, 256) for n in SIZES for i in range(3 if n > 1 << 18 else 20)}
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for model in ("base", "a", "b"):
        step = 0.0 if model == "base" else 3e-4
        made = {n: (t + step * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        (root / model).mkdir(exist_ok=True)
        save_file(made, root / model / "model.safetensors")
    plan = gm.plan(recipe(root, method))
    opened = open_inputs(plan)
    spent: dict[int, list[float]] = {}
    torch.set_num_threads(1)
    with OutputDirectory(root / f"out-{method}") as output:
        layout = layout_of(plan, DEFAULT_SHARD_SIZE)
        output.create(layout)
        work = Work(Builder(plan, opened), FileSink(output, layout), lambda nbytes: None, threading.Event())
        for _ in range(2):  # the first pass warms the caches
            for node in plan.output_nodes():
                begun = time.thread_time()
                work.make(node)
                spent.setdefault(node.numel, []).append(time.thread_time() - begun)
        output.abandon()
    for checkpoint in opened:
        checkpoint.close()
    return [(n, float(np.median(times[len(times) // 2 :]))) for n, times in sorted(spent.items())]


def cost(numel: int, known: list[tuple[int, float]]) -> float:
    """Seconds for a tensor: interpolated between measured sizes, in proportion beyond the largest."""
    if numel >= known[-1][0]:
        return known[-1][1] * numel / known[-1][0]
    return float(np.interp(numel, [n for n, _ in known], [s for _, s in known]))


def simulated(nodes: list[Node], known: list[tuple[int, float]]) -> float:
    """Seconds until a machine's last core is idle, as `geomerge.engine.processes` hands out work: largest first; a tensor
    that is more than a core's share is made by all together."""
    total = sum(node.numel for node in nodes)
    shared = [n for n in nodes if n.numel > 1 << 24 and n.numel * CORES > total]
    rest = [(0, n) for n in nodes if not (n.numel > 1 << 24 and n.numel * CORES > total)]
    free = [0.0] * CORES
    for bundle in bundles(sorted(rest, key=lambda item: -item[1].numel)):
        heapq.heappush(free, heapq.heappop(free) + sum(cost(n.numel, known) for _, n in bundle))
    return sum(cost(n.numel, known) for n in shared) / CORES + max(free)


def row(
    model: str, method: str, plan: Plan, planning: float, machines: int, known: list[tuple[int, float]]
) -> dict[str, Any]:
    """The arithmetic of one merge on so many machines."""
    nodes = list(plan.output_nodes())
    pieces = [[nodes[i] for i in piece] for piece in divide(nodes, machines)]
    written = [sum(n.nbytes for n in piece) / 1e9 for piece in pieces]
    read = [sum(n.nbytes * len(n.operands) for n in piece) / 1e9 for piece in pieces]
    seconds = {"computing": max(simulated(piece, known) for piece in pieces)}
    if machines == 1:
        seconds["disk"] = read[0] / DISK_READ + written[0] / DISK_WRITE
    else:
        seconds["network"] = max(*read, *written) / LINK
        seconds["file system"] = sum(read) / SERVER_READ + sum(written) / SERVER_WRITE
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "model": model,
        "method": method,
        "machines": machines,
        "read_gb": sum(read),
        "written_gb": sum(written),
        "largest_read_gb": max(read),
        "largest_written_gb": max(written),
        "unevenness": max(written) / (sum(written) / machines),
        "seconds": seconds,
        "expected": planning + seconds[bound],
        "bound": bound,
    }


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def tables(data: Mapping[str, Any]) -> str:
    """The tables of docs/scale.md."""
    machine = data["machine"]
    lines = [
        f"Measured {machine['date']} on one core of {machine['cpu']} with Python {machine['python']}, other programs running.",
        "",
        "| plan | tensors | parameters | files | seconds | processor seconds | memory with all libraries |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['model']} {p['method']} | {p['tensors']:,} | {p['parameters'] / 1e9:,.0f} B | {p['files']:,} "
        f"| {p['seconds']:.1f} | {p['cpu']:.1f} | {p['peak_mb']:.0f} MB |"
        for p in data["plans"]
    ]
    lines += [
        "",
        "| one core | " + " | ".join(f"{n:,} elements" for n in SIZES) + " |",
        "|---" * (1 + len(SIZES)) + "|",
    ]
    for method, known in data["costs"].items():
        lines.append(f"| {method} | " + " | ".join(f"{1e9 * s / n:.1f} ns an element" for n, s in known) + " |")
    lines += [
        "",
        "| merge | machines | read | written | largest shard | computes | disk or link | file system | expected | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        s = r["seconds"]
        wire = s.get("disk", s.get("network", 0.0))
        served = duration(s["file system"]) if "file system" in s else ""
        lines.append(
            f"| {r['model']} {r['method']} | {r['machines']} | {r['read_gb']:,.0f} GB | {r['written_gb']:,.0f} GB "
            f"| {r['largest_written_gb']:,.1f} GB ({r['unevenness']:.2f} of the mean) | {duration(s['computing'])} "
            f"| {duration(wire)} | {served} | **{duration(r['expected'])}** | {r['bound']} |"
        )
    return "\n".join(lines) + "\n"


def cpu() -> str:
    """The processor's name."""
    try:
        return next(
            line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="Where to make the files; by default a temporary directory.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="geomerge-scale-") as folder:
        root = Path(folder)
        (root / "small").mkdir()
        costs = {method: measured(root / "small", method) for method in METHODS}
        plans, rows = [], []
        for name, (shapes, config) in MODELS.items():
            place = root / name.split()[0]
            for model in ("base", "a", "b"):
                hollow(place / model, shapes(), config)
            for method in METHODS:
                facts, plan = planned(place, method)
                parameters = sum(prod(node.shape) for node in plan.output_nodes())
                files = sum(len(i.files) for i in plan.inputs)
                plans.append({"model": name, "method": method, "parameters": parameters, "files": files, **facts})
                rows += [row(name, method, plan, facts["cpu"], n, costs[method]) for n in MACHINES]
                print(plans[-1])
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    machine = {"date": made, "cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    data = {"machine": machine, "plans": plans, "costs": costs, "rows": rows}
    (ROOT / "docs" / "scale.json").write_text(json.dumps(data, indent=1) + "\n")
    page = ROOT / "docs" / "scale.md"
    pattern = re.compile(r"(<!-- scale:start -->\n).*?(<!-- scale:end -->)", re.DOTALL)
    before = page.read_text()
    page.write_text(pattern.sub(lambda m: m[1] + tables(data) + m[2], before))
    print(tables(data))


if __name__ == "__main__":
    main()
