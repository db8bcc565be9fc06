"""A suite on disk: a base, its experts, and how to find them by a short name.

A reference is a directory with a ``suite.json``, or ``NAME``, ``NAME-SIZE``, ``NAME:SIZE``, ``NAME:SIZE:SEED``. By name the
suites that ship with the package are looked through first, then those that `geomerge lab build` has made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from geomerge.errors import ModelError, UsageError
from geomerge.lab.cache import FORMAT, lab_cache, suite_place
from geomerge.lab.kinds import KINDS, LabTask, SuiteKind, check_size, get_kind

if TYPE_CHECKING:
    from torch import nn

FILE = "suite.json"
SHIPPED = Path(__file__).parent / "shipped"
_REFERENCE = re.compile(r"(?P<name>[a-z]+)(?:[:-](?P<size>[a-z]+))?(?::(?P<seed>[0-9]{1,18}))?", re.ASCII)
_LARGEST = 4_000_000


@dataclass(frozen=True)
class Suite:
    """A built suite.

    Attributes:
        root: Its directory.
        name, size, seed: What it was built as.
        kind: ``causal-lm``, ``image-classification`` or ``mlp``.
        base: The base's model directory.
        experts: The model directory of each task's expert.
        others: Further models by name, such as ``instruct``.
        heads: The file of each task's frozen head, where the suite has heads.
        scores: Accuracy (0 to 1) on the test split when it was built: model, then task. ``average`` is the experts' mean.
        settings: What it was built with.
    """

    root: Path
    name: str
    size: str
    seed: int
    kind: str
    base: Path
    experts: Mapping[str, Path]
    others: Mapping[str, Path] = field(default_factory=dict)
    heads: Mapping[str, Path] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def tasks(self) -> dict[str, LabTask]:
        """The suite's tasks by name."""
        return get_kind(self.name).tasks(self.size, self.seed, self.heads)

    @property
    def models(self) -> dict[str, Path]:
        """Every model's directory: the base, the experts by task, the others."""
        return {"base": self.base, **self.experts, **self.others}

    def load(self, model: str | Path) -> nn.Module:
        """A model of the suite, by its name in `models`, or any other model directory of the same architecture."""
        path = self.models.get(str(model), Path(model))
        return get_kind(self.name).load_model(path)


@dataclass(frozen=True)
class Listed:
    """A suite that can be had.

    Attributes:
        name, size, title: Which.
        kind: See `Suite.kind`.
        shipped: Its directory in the package, if it ships with it (that is seed 0).
        built: Seeds in the cache, built with today's settings, with their directories.
    """

    name: str
    size: str
    title: str
    kind: str
    shipped: Path | None
    built: Mapping[int, Path]


def suites() -> list[Listed]:
    """All suites in all sizes, whether they exist or have to be built."""
    found = []
    for name in KINDS:
        kind = get_kind(name)
        for size in kind.sizes:
            shipped = SHIPPED / f"{name}-{size}"
            built = {}
            for place in sorted(lab_cache().glob(f"{name}-{size}-*/{FILE}")):
                seed = place.parent.name.split("-")[2]
                if seed.isdigit() and suite_place(name, size, int(seed), kind.settings(size)) == place.parent:
                    built[int(seed)] = place.parent
            found.append(
                Listed(name, size, kind.title, kind.kind, shipped if (shipped / FILE).is_file() else None, built)
            )
    return found


def load_suite(reference: str | Path) -> Suite:
    """Find a suite.

    Args:
        reference: A directory, or a name: ``"skills"``, ``"skills-tiny"``, ``"skills:small:3"``.

    Raises:
        UsageError: There is no such suite, or it has not been built.
        ModelError: Its ``suite.json`` is damaged.
    """
    text = str(reference)
    if "\0" in text or not text:
        raise UsageError(f"{text!r} is not the name of a suite", hint=f"there are: {', '.join(KINDS)}")
    matched = _REFERENCE.fullmatch(text) if isinstance(reference, str) else None
    if matched is not None and matched["name"] in KINDS:
        return _by_name(matched["name"], matched["size"], matched["seed"])
    place = Path(reference)
    try:
        if (place / FILE).is_file():
            return read_suite(place)
        there = place.is_dir()
    except OSError:
        there = False
    if there:
        raise UsageError("the directory holds no suite", where=text, hint=f"a suite's directory has a {FILE}")
    if matched is not None:
        get_kind(matched["name"])
    raise UsageError(
        f"there is no suite {text!r}",
        hint=f"write NAME, NAME:SIZE or NAME:SIZE:SEED with one of the names {', '.join(KINDS)}, or a suite's directory",
    )


def _by_name(name: str, size: str | None, seed: str | None) -> Suite:
    kind = get_kind(name)
    size = size or kind.sizes[0]
    check_size(kind, size)
    number = int(seed or 0)
    shipped = SHIPPED / f"{name}-{size}"
    if (shipped / FILE).is_file():
        suite = read_suite(shipped)
        if suite.seed == number:
            return suite
    place = suite_place(name, size, number, kind.settings(size))
    if (place / FILE).is_file():
        return read_suite(place)
    raise UsageError(
        f"the suite {name!r} of size {size!r} and seed {number} has not been built",
        hint=f"geomerge lab build {name} --size {size} --seed {number}",
    )


def read_suite(place: Path) -> Suite:
    """Read a suite's directory.

    Raises:
        ModelError: Its ``suite.json`` is missing, damaged or of another version, or names a place outside of it.
    """
    where = str(place / FILE)
    try:
        if (place / FILE).stat().st_size > _LARGEST:
            raise ModelError("it is far too large to describe a suite", where=where)
        data = json.loads((place / FILE).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ModelError(
                f"it is of format {data['format']!r}; this version of geomerge reads {FORMAT}", where=where
            )
        kind: SuiteKind = get_kind(str(data["suite"]))
        check_size(kind, data["size"])
        return Suite(
            root=place,
            name=kind.name,
            size=data["size"],
            seed=int(data["seed"]),
            kind=kind.kind,
            base=_inside(place, data["base"]),
            experts={task: _inside(place, path) for task, path in data["experts"].items()},
            others={name: _inside(place, path) for name, path in data.get("others", {}).items()},
            heads={task: _inside(place, path) for task, path in data.get("heads", {}).items()},
            scores={m: {t: float(v) for t, v in row.items()} for m, row in data.get("scores", {}).items()},
            settings=dict(data.get("settings", {})),
        )
    except OSError as error:
        raise ModelError(f"it cannot be read: {error.strerror}", where=where) from None
    except UsageError as error:
        raise ModelError(error.what, where=where) from None
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"it does not describe a suite ({type(error).__name__}: {error})", where=where) from None


def _inside(root: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise ModelError(f"it names a place outside of the suite: {path!r}", where=str(root / FILE))
    return root / parts


def load_model(path: str | Path) -> nn.Module:
    """A model directory of any suite, or a merge of such, in float32 and in evaluation mode.

    Raises:
        ModelError: It cannot be read, or it is of no suite's architecture.
    """
    place = Path(path)
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"its config.json cannot be read: {error}", where=str(path)) from None
    name = {"geomerge_mlp": "mlp", "vit": "glyphs"}.get(str(model_type), "skills")
    return get_kind(name).load_model(place)
