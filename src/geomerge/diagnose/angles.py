"""Angles, norms and cosines of models, tensor by tensor, from one pass over all of them.

Of each tensor the K×K Gram matrix is measured (`geomerge.methods.gram`), which holds the angles of all pairs; with a base it
is centred on the base and holds those of the task vectors, too. The Gram matrices of a group's tensors (a block's tensors of
one role) add up to the group's. The pass runs on the engine's workers, so its memory does not grow with the models.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from geomerge.checkpoint.dtypes import DTYPES
from geomerge.diagnose import task_vectors
from geomerge.diagnose.group import Group, group_of
from geomerge.diagnose.parents import Parents
from geomerge.engine.build import Builder
from geomerge.engine.execute import Facts, Threads, Work
from geomerge.engine.plan import Node
from geomerge.engine.processes import Processes, interpreted, suitable
from geomerge.engine.run import Progress
from geomerge.engine.sources import FileSource, HeldSource
from geomerge.errors import NotFiniteError
from geomerge.late import without_gradients
from geomerge.methods import native
from geomerge.methods.gram import Gram
from geomerge.methods.kernel import measure_gram
from geomerge.methods.tile import Scan, Source

_NARROW = ("BF16", "F16")


@dataclass(frozen=True)
class TaskReading:
    """Two task vectors over one tensor or group.

    Attributes:
        angle: Radians; `None` where one of them is zero.
        norms: ‖τ_a‖, ‖τ_b‖.
        signs: The share of elements of the same sign among those that both moved.
        support: The overlap of their largest elements.
    """

    angle: float | None
    norms: tuple[float, float]
    signs: float | None
    support: float | None

    @property
    def cosine(self) -> float | None:
        """cos of the angle."""
        return None if self.angle is None else math.cos(self.angle)


@dataclass(frozen=True)
class Reading:
    """Two models over one tensor or group.

    Attributes:
        name: The tensor's name, or the group in words.
        group: The group that it is, or belongs to.
        numel: Elements.
        angle: ω in radians; `None` where exactly one of the two is zero.
        norms: ‖θ_a‖, ‖θ_b‖.
        task: The same of the task vectors, when there is a base.
    """

    name: str
    group: Group
    numel: int
    angle: float | None
    norms: tuple[float, float]
    task: TaskReading | None = None

    @property
    def cosine(self) -> float | None:
        """cos ω."""
        return None if self.angle is None else math.cos(self.angle)

    @property
    def ratio(self) -> float | None:
        """‖θ_b‖ / ‖θ_a‖."""
        return self.norms[1] / self.norms[0] if self.norms[0] else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        made: dict[str, Any] = {
            "name": self.name,
            "module": self.group.module,
            "block": int(self.group.column) if self.group.column.isdigit() else None,
            "position": self.group.column if not self.group.column.isdigit() else "block",
            "role": self.group.role,
            "elements": self.numel,
            "angle": self.angle,
            "cosine": self.cosine,
            "norms": list(self.norms),
            "ratio": self.ratio,
        }
        if self.task is not None:
            made["task_vectors"] = {
                "angle": self.task.angle,
                "cosine": self.task.cosine,
                "norms": list(self.task.norms),
                "sign_agreement": self.task.signs,
                "support_overlap": self.task.support,
            }
        return made


@dataclass(frozen=True)
class PairAngles:
    """Two models, tensor by tensor and group by group."""

    tensors: tuple[Reading, ...]
    groups: tuple[Reading, ...]

    @property
    def omega_bar(self) -> float:
        """ω̄: the unweighted mean of the groups' angles, in radians."""
        found = [g.angle for g in self.groups if g.angle is not None]
        return math.fsum(found) / len(found) if found else 0.0

    @property
    def omega_weighted(self) -> float:
        """The mean of the groups' angles, each counted by its elements."""
        found = [(g.angle, g.numel) for g in self.groups if g.angle is not None]
        return math.fsum(a * n for a, n in found) / max(sum(n for _, n in found), 1)

    @property
    def mean_cosine(self) -> float:
        """The unweighted mean of the groups' cosines."""
        found = [g.cosine for g in self.groups if g.cosine is not None]
        return math.fsum(found) / len(found) if found else 1.0

    def task_means(self) -> tuple[float | None, float | None, float | None]:
        """Over the groups: the mean angle of the task vectors, their sign agreement, the overlap of their supports."""
        tasks = [g.task for g in self.groups if g.task is not None]
        return _mean([t.angle for t in tasks]), _mean([t.signs for t in tasks]), _mean([t.support for t in tasks])

    def task_norms(self) -> tuple[float, float] | None:
        """‖τ_a‖ and ‖τ_b‖ of the whole models; `None` without a base."""
        tasks = [g.task for g in self.groups if g.task is not None]
        if not tasks:
            return None
        return math.hypot(*(t.norms[0] for t in tasks)), math.hypot(*(t.norms[1] for t in tasks))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


@dataclass(frozen=True)
class Survey:
    """What one pass found.

    Attributes:
        grams: Tensor → Gram matrix of all models (the base first).
        shares: Tensor → pair of models → sign agreement and overlap of supports; empty without a base.
        not_finite: Tensor → index in `Parents.all` → how many NaN and Inf it holds. Such tensors have no Gram matrix.
    """

    grams: Mapping[str, Gram]
    shares: Mapping[str, task_vectors.Shares]
    not_finite: Mapping[str, Mapping[int, tuple[int, int]]]


def survey(
    parents: Parents,
    *,
    top: float = 0.2,
    exact: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Read all models once.

    Args:
        parents: The models.
        top: The share of elements that counts as a task vector's support.
        exact: Look at every element for the signs and supports of task vectors, not at a sample.
        threads: By default one for each core that the process may use.
        progress: Told how many bytes have been read.
    """
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        if progress is not None:
            with lock:
                progress.advance(nbytes)

    work = _Measure(
        Builder(parents.plan, parents.inputs),
        _Nowhere(),
        advance,
        threading.Event(),
        based=parents.base is not None,
        top=top,
        exact=exact,
    )
    nodes = list(enumerate(parents.plan.nodes))
    if progress is not None:
        progress.start(sum(_nbytes(node) for _, node in nodes), 0)
    facts: dict[int, Facts] = {}

    def done(entries: list[tuple[int, Facts]]) -> None:
        with lock:
            facts.update(entries)

    in_memory = any(c.memory for c in parents.inputs)
    # Compiled loops leave the interpreter's lock to the other threads; what task vectors share is torch's.
    loops = native.available() and not (work.based and len(parents.inputs) > 2)
    slow = sum(interpreted(node, loops=loops) for _, node in nodes)
    forks = not in_memory and suitable(slow, threads)
    executor = Processes(work, threads, with_torch=not loops) if forks else Threads(work, threads)
    executor.run(nodes, done)
    if progress is not None:
        progress.finish()
    ordered = [(node.name, facts[i]) for i, node in nodes]
    return Survey(
        grams={name: Gram(np.array(f["gram"])) for name, f in ordered if "gram" in f},
        shares={name: f["shares"] for name, f in ordered if "shares" in f},
        not_finite={name: f["not_finite"] for name, f in ordered if "not_finite" in f},
    )


def _nbytes(node: Node) -> int:
    """What reading a node's inputs moves, taking all to have the first one's dtype."""
    return node.numel * DTYPES[node.dtype].itemsize * len(node.operands)


class _Nowhere:
    """A sink for work that writes nothing."""

    readable = False

    def write(self, node: Node, start: int, values: torch.Tensor) -> None:
        """Never called."""

    def stored(self, node: Node) -> None:
        """Nowhere."""


@dataclass
class _Measure(Work):
    """Measures nodes instead of making them."""

    based: bool = False
    top: float = 0.2
    exact: bool = False
    _kept: dict[str, Any] = field(default_factory=dict)

    @without_gradients()
    def make(self, node: Node, run: Callable[..., Iterable[Any]] = map) -> Facts:
        """A node's Gram matrix and what its task vectors share."""
        sources: list[Source] = [self.builder.source(operand, node) for operand in node.operands]
        if node.numel <= self.builder.tile:
            sources = [HeldSource(s, node.numel) if isinstance(s, FileSource) else s for s in sources]

        def open_scan(**tiling: Any) -> Scan:
            return Scan(sources, node.shape, name=node.name, run=self._watched(run), **tiling)

        facts: Facts = {}
        try:
            facts["gram"] = measure_gram(open_scan).centred.tolist()
        except NotFiniteError:
            facts["not_finite"] = _count_bad(open_scan(check=False))
        else:
            if self.based and len(sources) > 2 and node.numel:
                narrow = all(source.dtype in _NARROW for source in sources)
                scan = open_scan(check=False, single=narrow)
                facts["shares"] = task_vectors.compare(scan, self.top, exact=self.exact)
        self.advance(_nbytes(node))
        return facts


def _count_bad(scan: Scan) -> dict[int, tuple[int, int]]:
    """How many NaN and Inf each source holds; those without any are left out."""

    def count(tiles: Iterable[Any]) -> list[tuple[int, int]]:
        found = [(0, 0)] * len(scan.sources)
        for tile in tiles:
            for i, x in enumerate(tile.inputs):
                nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
                found[i] = (found[i][0] + nan, found[i][1] + inf)
        return found

    parts = scan.over(count)
    totals = {i: (sum(p[i][0] for p in parts), sum(p[i][1] for p in parts)) for i in range(len(scan.sources))}
    return {i: counts for i, counts in totals.items() if any(counts)}


def pair_angles(parents: Parents, found: Survey, a: int, b: int) -> PairAngles:
    """The readings of two of the models (indices in `Parents.models`)."""
    based = parents.base is not None
    tensors = []
    grams: dict[Group, list[tuple[int, Gram, tuple[float | None, float | None]]]] = defaultdict(list)
    for node in parents.plan.nodes:
        gram = found.grams.get(node.name)
        if gram is None:
            continue
        group = group_of(parents.parts[node.name])
        shares = found.shares.get(node.name, {}).get((a, b), (None, None))
        tensors.append(_reading(node.name, group, node.numel, gram, shares, a, b, based=based))
        grams[group].append((node.numel, gram, shares))
    groups = []
    for group, members in grams.items():
        total = Gram(
            np.array(
                [
                    [math.fsum(m[1].centred[i, j] for m in members) for j in range(members[0][1].count)]
                    for i in range(members[0][1].count)
                ]
            )
        )
        shares = (_weighted([(m[2][0], m[0]) for m in members]), _weighted([(m[2][1], m[0]) for m in members]))
        groups.append(_reading(str(group), group, sum(m[0] for m in members), total, shares, a, b, based=based))
    return PairAngles(tuple(tensors), tuple(groups))


def _weighted(values: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(v, n) for v, n in values if v is not None and n]
    return math.fsum(v * n for v, n in known) / sum(n for _, n in known) if known else None


def _reading(
    name: str,
    group: Group,
    numel: int,
    gram: Gram,
    shares: tuple[float | None, float | None],
    a: int,
    b: int,
    *,
    based: bool,
) -> Reading:
    i, j = (a + 1, b + 1) if based else (a, b)
    norms = float(gram.norm(i)), float(gram.norm(j))
    task = None
    if based:
        tau = gram.task_vectors()
        lengths = float(tau.norm(a)), float(tau.norm(b))
        task = TaskReading(float(tau.angle(a, b)) if all(lengths) else None, lengths, *shares)
    return Reading(name, group, numel, _angle(gram, i, j, norms), norms, task)


def _angle(gram: Gram, i: int, j: int, norms: tuple[float, float]) -> float | None:
    if (norms[0] == 0) != (norms[1] == 0):
        return None
    return float(gram.angle(i, j))
