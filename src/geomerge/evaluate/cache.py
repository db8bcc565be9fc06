"""Scores that are known already: one file for each model, task and settings, below ``$XDG_CACHE_HOME/geomerge/scores``.

A file is NumPy's ``.npz`` without pickles. One that cannot be read is as good as none. Looking up a score imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from geomerge.evaluate.samples import Samples

if TYPE_CHECKING:
    from geomerge.evaluate.task import Settings, Task

FORMAT = 1
"""Raised when the same key may mean another score."""

_ARRAYS = ("values", "weights", "strata", "baselines")


@dataclass(frozen=True)
class Known:
    """A score with what has to be told about its task.

    Attributes:
        samples: The outcomes.
        metric, higher_is_better, chance: See `geomerge.evaluate.task.Task`.
        seconds: What it took.
    """

    samples: Samples
    metric: str
    higher_is_better: bool
    chance: float | None
    seconds: float


def score_cache() -> Path:
    """The directory of all known scores; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG says that a relative path is to be ignored.
    root = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return root / "geomerge" / "scores"


def key_of(model: str, task: Task, settings: Settings) -> str | None:
    """The name of a score's file.

    Args:
        model: The model's hash.
        task: Its version must be known.
        settings: All of them count.

    Returns:
        `None` when the task has no version: such scores are not kept.
    """
    if task.version is None:
        return None
    content = [FORMAT, model, task.source, task.name, task.version, asdict(settings)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def look_up(key: str) -> Known | None:
    """A score that is known, or `None`."""
    import numpy as np

    try:
        # Opened here: of a damaged file numpy leaves its own descriptor open.
        with _place(key).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            meta: dict[str, Any] = json.loads(str(file["meta"]))
        samples = Samples.of(
            arrays["values"],
            meta["hashes"],
            weights=arrays["weights"],
            strata=arrays["strata"],
            baselines=arrays["baselines"],
            link=meta["link"],
        )
        chance = meta["chance"]
        return Known(
            samples,
            str(meta["metric"]),
            bool(meta["higher_is_better"]),
            None if chance is None else float(chance),
            float(meta["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, RuntimeError):
        return None


def keep(key: str, known: Known) -> None:
    """Write a score down; the file appears whole or not at all. A cache that cannot be written is no error."""
    import numpy as np

    meta = {
        "metric": known.metric,
        "higher_is_better": known.higher_is_better,
        "chance": known.chance,
        "seconds": known.seconds,
        "link": known.samples.link,
        "hashes": list(known.samples.hashes),
    }
    place = _place(key)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                arrays = {name: getattr(known.samples, name) for name in _ARRAYS}
                np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)
            Path(unfinished).replace(place)
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _place(key: str) -> Path:
    return score_cache() / key[:2] / f"{key}.npz"
