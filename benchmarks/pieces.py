"""What the pieces of a merge cost: nanoseconds an element on one core, and what workers gain.

    python benchmarks/pieces.py              # operations on tiles, reading, writing
    python benchmarks/pieces.py workers      # TIES of the 0.5B models with 1 and 2 threads, and with 2 processes
    python benchmarks/pieces.py writes       # a gigabyte into the page cache by writes of several sizes, in turn
    python benchmarks/pieces.py loops        # the compiled loops alone over whole files, with two threads, beside cp
    python benchmarks/pieces.py copies       # into and out of the page cache, by where the target lies beside the source
    python benchmarks/pieces.py groups       # recorded methods with operations compiled together, and one after the other
    python benchmarks/pieces.py sorts        # NumPy's sorts and the compiled ones, of normal numbers and of a coarse grid
    python benchmarks/pieces.py thresholds   # the k largest magnitudes, of rows that are alike and of rows that are not
    python benchmarks/pieces.py scores       # thresholds and output of PCB-Merging and Arcee Fusion, and rows' divergences
    python benchmarks/pieces.py pruning      # DELLA's output for task vectors of several sizes and with heavy tails
    python benchmarks/pieces.py processes    # whole merges of 0.5B: with torch imported first, and without compiled loops
    python benchmarks/pieces.py pursuit 1000 # sums of 64 rows for 1,000 missing tokens, 50,000 shared tokens of width 896

These are the figures that decided how the engine works; docs/benchmarks.md quotes them.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomerge.methods import native

BENCH = Path(__file__).resolve().parent.parent / ".bench"
N = 1 << 17


def report(name: str, work: Callable[[], object], elements: int = N) -> None:
    """Print the best of several timings."""
    work()
    best = float("inf")
    for _ in range(9):
        begun = time.perf_counter()
        for _ in range(30):
            work()
        best = min(best, (time.perf_counter() - begun) / 30)
    print(f"{name:48s}{best / elements * 1e9:8.3f} ns", flush=True)


def operations() -> None:
    """Operations on one tile."""
    torch.set_num_threads(1)
    half = (torch.randn(N) * 0.02).bfloat16()
    single, other = half.float(), torch.randn(N)
    double, second = half.double(), torch.randn(N, dtype=torch.float64)
    out32, out64, out16 = torch.empty(N), torch.empty(N, dtype=torch.float64), torch.empty(N, dtype=torch.bfloat16)
    mask = single > 0
    array = single.abs().numpy()
    bits = single.view(torch.int32).numpy() >> 16 & 0x7FFF
    report("bfloat16 to float32", lambda: out32.copy_(half))
    report("bfloat16 to float64", lambda: out64.copy_(half))
    report("float64 to bfloat16", lambda: out16.copy_(double))
    report("x += c·y, float32", lambda: out32.add_(other, alpha=0.3))
    report("x += c·y, float64", lambda: out64.add_(second, alpha=0.3))
    report("hardshrink, float32", lambda: torch.hardshrink(single, 0.01, out=out32))
    report("sum of products, float32, pairwise", lambda: torch.mul(single, other, out=out32).view(-1, 8192).sum(1))
    report("sum of products, float64", lambda: torch.mul(double, second, out=out64).view(-1, 8192).sum(1))
    report("torch.where, float32", lambda: torch.where(mask, single, other))
    report("masked_fill_, float32", lambda: out32.masked_fill_(mask, 0))
    report("isfinite().all(), float32", lambda: torch.isfinite(single).all())
    report("sum, float32", single.sum)
    report("NumPy comparison and count", lambda: np.count_nonzero(array < 0.01))
    report("NumPy flatnonzero, 0.1 % found", lambda: np.flatnonzero(array < 2e-5))
    report("NumPy flatnonzero, half found", lambda: np.flatnonzero(array < 0.0135))
    report("bincount of 16 bits", lambda: np.bincount(bits, minlength=1 << 15))
    report("sort, float32", lambda: np.sort(array))
    report("random words, 32 bits", lambda: np.random.PCG64DXSM(1).random_raw(N // 2))


def files() -> None:
    """Reading and writing in pieces of 256 KiB, all in the page cache; an element is two bytes."""
    source = BENCH / "0.5B" / "a" / "model.safetensors"
    size = source.stat().st_size
    buffer = np.ones(1 << 18, dtype=np.uint8)
    descriptor = os.open(source, os.O_RDONLY)

    def once(name: str, work: Callable[[], object]) -> None:
        best = float("inf")
        for _ in range(3):
            begun = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - begun)
        print(f"{name:48s}{best / (size / 2) * 1e9:8.3f} ns", flush=True)

    def read() -> None:
        for offset in range(0, size, len(buffer)):
            os.preadv(descriptor, [buffer], offset)

    def mapped() -> None:
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as view:
            array = np.frombuffer(view, dtype=np.uint64, count=size // 8)
            for start in range(0, len(array), 1 << 15):
                array[start : start + (1 << 15)].max()
            del array

    def write(allocate: bool) -> None:
        target = BENCH / "pieces.bin"
        out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if allocate:
            os.posix_fallocate(out, 0, size)
        for offset in range(0, size, len(buffer)):
            os.pwritev(out, [buffer], offset)
        os.close(out)
        target.unlink()

    once("preadv", read)
    once("mapped and looked at once", mapped)
    once("pwritev, allocated before", lambda: write(True))
    once("pwritev, growing", lambda: write(False))
    once("cp", lambda: shutil.copyfile(source, BENCH / "pieces.bin"))
    (BENCH / "pieces.bin").unlink()


def writes(nbytes: int = 1 << 30, rounds: int = 7) -> None:
    """Seconds for a gigabyte by the size of a write, into a file with and without its room: rounds in which they take turns."""
    target, data = BENCH / "writes.bin", memoryview(bytearray(4 << 20))
    taken: dict[tuple[int, bool], list[float]] = {(1 << k, room): [] for room in (True, False) for k in range(15, 23)}
    for _ in range(rounds):
        for (size, room), seconds in taken.items():
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            begun = time.perf_counter()
            if room:
                os.posix_fallocate(descriptor, 0, nbytes)
            for offset in range(0, nbytes, size):
                os.pwrite(descriptor, data[:size], offset)
            seconds.append(time.perf_counter() - begun)
            os.close(descriptor)
            target.unlink()
    for (size, room), seconds in taken.items():
        where = "allocated before" if room else "growing"
        print(
            f"writes of {size >> 10:5d} KiB, {where:17s} least {min(seconds):.2f} s, median {statistics.median(seconds):.2f} s",
            flush=True,
        )


def copies(nbytes: int = 1 << 26, window: int = 1 << 16, rounds: int = 5) -> None:
    """Reads and writes whose target begins so many bytes after the source, both taken within their pages of 4 KiB."""
    room = memoryview(mmap.mmap(-1, window + 8192))
    path = BENCH / "copies.bin"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(descriptor, 0, nbytes)
    places = range(2048, nbytes - window, window)

    def timed(copy: Callable[..., int], first: int) -> float:
        part = [room[first : first + window]]
        copy(descriptor, part, 2048)
        return min(_seconds(lambda: [copy(descriptor, part, place) for place in places]) for _ in range(rounds))

    moved = len(places) * window / 1e9
    print("bytes after the source  read GB/s  write GB/s")
    for after in (-64, -32, -16, 0, 8, 16, 24, 32, 48, 64, 576):
        read, write = timed(os.preadv, 2048 + after), timed(os.pwritev, 2048 - after)
        print(f"{after:22d}{moved / read:11.2f}{moved / write:12.2f}", flush=True)
    os.close(descriptor)
    path.unlink()


def loops(rounds: int = 5) -> None:
    """The least that a merge of the 0.5B models can take: reading, computing and writing with two threads."""
    names = ("base", "a", "b", "c")
    paths = [BENCH / "0.5B" / name / "model.safetensors" for name in names]
    files = [os.open(path, os.O_RDONLY) for path in paths]
    numel = os.fstat(files[0]).st_size // 2
    target = BENCH / "loops.bin"
    bf16, step = native.CODES["BF16"], 1 << 20
    threshold = (2.9e-4, 3.1e-4, (math.nan, math.nan))
    rule = native.Combination(True, [1.0] * 3, [1.0] * 3, True, 1.0)
    thinned = native.whole(3)
    for each in thinned:
        each.keep = 3e-4

    def run(name: str) -> float:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.posix_fallocate(descriptor, 0, 2 * numel)

        def inputs(start: int, count: int) -> native.Inputs:
            last = min(start + step, numel) - start
            return native.Inputs([native.Stored(bf16, file=f, offset=2 * start) for f in files[:count]], last)

        def look(start: int) -> None:
            if name == "slerp":
                native.gram(inputs(start, 2), 1 << 13, single=True)
            elif name == "ties":
                native.survey(inputs(start, 4), [(k, threshold) for k in range(3)], single=True, check=True)

        def make(start: int) -> None:
            out = native.Stored(bf16, file=descriptor, offset=2 * start)
            if name == "ties":
                native.task_vectors(inputs(start, 4), thinned, rule, out, single=True, limit=2.0**-11, check=False)
            else:
                native.span(inputs(start, 2), [0.5, 0.5], out)

        begun = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            for work in (look, make):
                list(pool.map(work, range(0, numel, step)))
        taken = time.perf_counter() - begun
        os.close(descriptor)
        target.unlink()
        return taken

    def copied() -> float:
        begun = time.perf_counter()
        subprocess.run(["cp", str(paths[1]), str(target)], check=True)
        taken = time.perf_counter() - begun
        target.unlink()
        return taken

    room = bytearray(1 << 20)
    found: dict[str, list[float]] = {"cp": [], "linear": [], "slerp": [], "ties": []}
    for _ in range(rounds):
        for name, seconds in found.items():
            # Into the page cache, with little memory of this process's own: what it frees would be the output's next pages.
            for file in files:
                for start in range(0, 2 * numel, len(room)):
                    os.preadv(file, [room], start)
            seconds.append(copied() if name == "cp" else run(name))
    for name, seconds in found.items():
        ratio = statistics.median(s / c for s, c in zip(seconds, found["cp"], strict=True))
        print(
            f"{name:8s}{min(seconds):6.2f} s least, {statistics.median(seconds):6.2f} s median, {ratio:.2f} x cp",
            flush=True,
        )


def groups(numel: int = 1 << 20, rounds: int = 15) -> None:
    """What compiling recorded operations together gives: the loop that makes the output, in memory, on one core."""
    from unittest import mock

    from geomerge.methods import registry, steps
    from geomerge.methods.kernel import Prepared, prepare
    from geomerge.methods.tile import Scan, TensorSource

    torch.set_num_threads(1)
    base = (torch.randn(numel) * 0.02).bfloat16()
    experts = [(base.float() + torch.randn(numel) * 0.002).bfloat16() for _ in range(3)]
    out = native.in_memory(torch.empty(numel, dtype=torch.bfloat16))
    assert out is not None

    def prepared(name: str, known: bool) -> Prepared:
        steps.laid_out.cache_clear()
        method = registry.get(name).make({}, count=3)
        sources = [TensorSource(x.view(-1, 1024)) for x in (base, *experts)]

        def opened(**options: object) -> Scan:
            return Scan(sources, (numel // 1024, 1024), name="x", **options)  # type: ignore[arg-type]

        with mock.patch.object(steps, "_known", steps._known if known else dict):
            return prepare(method, opened, (numel // 1024, 1024), 1.0, "BF16")

    print(f"{'ns an element':18s}{'together':>10s}{'one by one':>12s}{'times':>7s}")
    for name in ("tall_mask", "ram", "emr", "consensus", "ramplus_tl", "sce", "widen", "consensus_ties"):
        best = {}
        for known in (True, False):
            made = prepared(name, known)
            loop = made.loop("BF16")
            assert loop is not None
            place = next(made.scan.places(made.scan.segments[0]))
            best[known] = min(_seconds(functools.partial(loop, place, out, None)) for _ in range(rounds)) / numel * 1e9
        print(f"{name:18s}{best[True]:10.2f}{best[False]:12.2f}{best[False] / best[True]:7.2f}", flush=True)


def thresholds(rows: int = 4864, width: int = 896, rounds: int = 9) -> None:
    """Three experts' thresholds of TIES, on one core: rows of one size, and rows and columns that differ by factors."""
    from geomerge.methods import order
    from geomerge.methods.sparsify import magnitudes
    from geomerge.methods.tile import Scan, TensorSource

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    missed: list[int] = []
    counting = order.by_counting
    order.by_counting = lambda *a, **o: missed.append(1) or counting(*a, **o)  # type: ignore[func-returns-value]
    print(f"{'rows':12s}{'ns an element':>16s}{'missed of':>12s}{3 * rounds:3d}")
    for name, spread in (("alike", 0.0), ("different", 1.0)):
        missed.clear()
        found = []
        for _ in range(rounds):
            sizes = np.exp(spread * (random.standard_normal((rows, 1)) + 0.5 * random.standard_normal((1, width))))
            base = random.standard_normal((rows, width)) * 0.02
            experts = [base + random.standard_normal((rows, width)) * 2e-4 * sizes for _ in range(3)]
            sources = [TensorSource(torch.from_numpy(x).bfloat16()) for x in (base, *experts)]
            scan = Scan(sources, (rows, width), single=True)
            work = functools.partial(order.largest, scan, magnitudes, [scan.numel // 5] * 3, range(3))
            found.append(_seconds(work) / scan.numel * 1e9)
        print(f"{name:12s}{statistics.median(found):16.2f}{len(missed):12d}", flush=True)


def scores(rows: int = 4096, width: int = 896, rounds: int = 9) -> None:
    """The loops of PCB, DELLA, DARE, SCE (three experts), Arcee Fusion and NearSwap, in memory, on one core."""
    from geomerge.methods import registry
    from geomerge.methods.tile import Scan, TensorSource

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = torch.randn(rows, width) * 0.02
    models = [m.bfloat16() for m in (base, *(base + torch.randn(rows, width) * 2e-4 for _ in range(3)))]
    out = torch.empty(rows * width, dtype=torch.bfloat16)
    stored = native.in_memory(out)
    assert stored is not None

    def show(name: str, work: Callable[[], object]) -> None:
        seconds = statistics.median(_seconds(work) for _ in range(rounds))
        print(f"{name:32s}{seconds / (rows * width) * 1e9:8.2f} ns", flush=True)

    thinned = {"weight": 0.5, "density": 0.5}
    for name, count, values in (
        ("pcb", 3, {}),
        ("arcee_fusion", 1, {}),
        ("della", 3, thinned),
        ("dare_ties", 3, thinned),
        ("sce", 3, {}),
        ("nearswap", 1, {"t": 1e-4}),
    ):
        made: Any = registry.get(name).make(values, count=count)
        scan = Scan(
            [TensorSource(m) for m in models[: count + 1]],
            (rows, width),
            columns=width if made.rows else None,
            single=made.single,
        )
        stats = made.measure(scan)
        make = made.compiled(scan, stats)
        places = [place for segment in scan.segments for place in scan.places(segment)]
        show(f"{name}, thresholds", lambda made=made, scan=scan: made.measure(scan))  # type: ignore[misc]
        show(f"{name}, output", lambda make=make, places=places: [make(p, stored.at(p.start), None) for p in places])  # type: ignore[misc]

    def divergences() -> None:
        unknown = native.Rows(width, np.full(rows, math.nan), 1e-8, known=False)
        native.importance_survey(scan.stored(0, scan.numel), 0, unknown, [], check=True)

    show("arcee_fusion, divergences alone", divergences)


def pruning(rounds: int = 9) -> None:
    """DELLA's output in memory, on one core, for task vectors of several kinds."""
    from geomerge.methods import registry
    from geomerge.methods.tile import Scan, TensorSource

    torch.set_num_threads(1)
    made: Any = registry.get("della").make({"weight": 0.5, "density": 0.5}, count=3)

    def heavy(x: torch.Tensor, spread: float) -> torch.Tensor:
        return x * torch.exp(spread * torch.randn_like(x))

    def outlier(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1] + 5, x[:, 1:]], 1)

    kinds: list[tuple[str, float, Callable[[torch.Tensor], torch.Tensor]]] = [
        *((f"{size / 0.02:g} of the base", size, lambda x: x) for size in (2e-4, 3e-5, 3e-6, 2e-3, 2e-2)),
        ("one column far off", 2e-4, outlier),
        *((f"factors of e^{s:g}", 2e-4, functools.partial(heavy, spread=s)) for s in (1.6, 2.0, 3.0)),
    ]
    print(f"{'task vectors':24s}{'columns':>8s}{'ns an element of three experts':>32s}")
    for width, (name, size, change) in itertools.product((896, 4096), kinds):
        torch.manual_seed(0)
        rows = (1 << 21) // width
        base = torch.randn(rows, width) * 0.02
        models = [m.bfloat16() for m in (base, *(base + change(torch.randn(rows, width) * size) for _ in range(3)))]
        out = torch.empty(rows * width, dtype=torch.bfloat16)
        stored = native.in_memory(out)
        assert stored is not None
        scan = Scan([TensorSource(m) for m in models], (rows, width), columns=width, single=made.single)
        make = made.compiled(scan, made.measure(scan))
        places = [place for segment in scan.segments for place in scan.places(segment)]
        work = lambda: [make(p, stored.at(p.start), None) for p in places]  # noqa: B023, E731
        seconds = statistics.median(_seconds(work) for _ in range(rounds))
        print(f"{name:24s}{width:8d}{seconds / (rows * width) * 1e9:32.2f}", flush=True)


def sorts() -> None:
    """NumPy's sorts and the compiled ones; the latter work in place, on a copy."""
    draw = np.random.default_rng(0)
    for n in (2_048, 8_192, 27_000, 152_000, 2_000_000):
        normal = draw.standard_normal(n)
        grid = np.abs(np.round(normal * 256)) / 2**16
        for kind, dtype in itertools.product(("normal", "grid"), (np.float32, np.float64)):
            values = (normal if kind == "normal" else grid).astype(dtype)
            several: list[tuple[str, Callable[[], object]]] = [
                ("NumPy", lambda v=values: np.sort(v)),  # type: ignore[misc]
                ("compiled", lambda v=values: native.sort(v.copy())),  # type: ignore[misc]
            ]
            for name, work in several:
                best = min(_seconds(work) for _ in range(15))
                print(f"{n:9,} {kind:6} {values.dtype}  {name:10}{best / n * 1e9:6.1f} ns", flush=True)
        for name, work in (
            ("NumPy", lambda v=normal: v.argsort(kind="stable")),
            ("compiled", lambda v=normal: native.ranks(v)),
        ):
            print(
                f"{n:9,} places, normal  {name:10}{min(_seconds(work) for _ in range(15)) / n * 1e9:6.1f} ns",
                flush=True,
            )


def pursuit(missing: int, shared: int = 50_000, width: int = 896, k: int = 64) -> None:
    """The sparse sums of `geomerge transplant`: seconds, and the least that their products take."""
    from geomerge.align.pursuit import pursue

    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(shared, width, generator=generator).bfloat16()
    targets = torch.randn(missing, width, generator=generator)
    left, right = torch.randn(1024, width), torch.randn(width, 4096)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    floor = min(_seconds(lambda: left @ right) for _ in range(5)) * missing * k * shared / (1024 * 4096)
    torch.set_num_threads(threads)
    clock, cpu = time.perf_counter(), time.process_time()
    pursue(lambda first, last: targets[first:last].double(), missing, atoms, k)
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    print(f"{missing:,} missing, {shared:,} shared, width {width}, k {k}: {cpu:.0f} s of the processors, {clock:.0f} s")
    print(f"its products alone, in float32: {floor:.0f} s of the processors")
    print(f"resident at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def processes(rounds: int = 5) -> None:
    """What importing torch late and the compiled loops give a whole process, in turn."""
    import run as bench

    first = "import sys, torch; sys.argv = {words!r}; from geomerge.__main__ import run; run()"
    bench_runs = bench.Bench(rounds, None)
    quiet, alone = bench.quiet(), [sys.executable, "-c", "import torch"]
    for method in ("linear", "slerp", "ties"):
        recipe = BENCH / f"{method}-0.5B.yml"
        recipe.write_text(bench.recipe(method, "0.5B"))
        words = ["geomerge", "merge", str(recipe), str(BENCH / "out"), "--quiet"]
        plain = [sys.executable, "-m", *words]
        ways = {
            "as it is": (plain, quiet),
            "torch imported first": ([sys.executable, "-c", first.format(words=words)], quiet),
            "GEOMERGE_NATIVE=0": (plain, quiet | {"GEOMERGE_NATIVE": "0"}),
            "import torch, and nothing else": (alone, quiet),
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (command, environment) in ways.items():
                bench_runs.clear()
                bench_runs.warm("0.5B")
                begun = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                taken[way].append(time.perf_counter() - begun)
        for way, seconds in taken.items():
            print(f"{method:8s}{way:32s}{statistics.median(seconds):6.2f} s", flush=True)
    bench_runs.clear()


def _seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def workers() -> None:
    """One merge by threads and by processes."""
    import run as bench

    from geomerge.engine import run
    from geomerge.engine.planner import make_plan
    from geomerge.recipe import loads

    suitable = run.suitable
    for name, threads, forks in (("1 thread", 1, False), ("2 threads", 2, False), ("2 processes", 2, True)):
        run.suitable = suitable if forks else lambda nodes, threads: False
        seconds = []
        for _ in range(3):
            plan, opened = make_plan(loads(bench.recipe("ties", "0.5B")))
            shutil.rmtree(BENCH / "out", ignore_errors=True)
            seconds.append(run.run_plan(plan, BENCH / "out", inputs=opened, threads=threads).seconds)
        print(f"ties 0.5B, {name}: {min(seconds):.2f} s", flush=True)
    shutil.rmtree(BENCH / "out", ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pursuit"]:
        pursuit(int(sys.argv[2]))
    elif sys.argv[1:] == ["loops"]:
        loops()
    elif sys.argv[1:] == ["writes"]:
        writes()
    elif sys.argv[1:] == ["copies"]:
        copies()
    elif sys.argv[1:] == ["groups"]:
        groups()
    elif sys.argv[1:] == ["scores"]:
        scores()
    elif sys.argv[1:] == ["pruning"]:
        pruning()
    elif sys.argv[1:] == ["sorts"]:
        sorts()
    elif sys.argv[1:] == ["thresholds"]:
        thresholds()
    elif sys.argv[1:] == ["processes"]:
        processes()
    elif sys.argv[1:] == ["workers"]:
        workers()
    else:
        operations()
        files()
