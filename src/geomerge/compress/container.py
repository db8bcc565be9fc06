"""What lies in a directory of compressed experts.

``model.safetensors`` (or shards): for each tensor that the experts changed ``vector.NAME``, the merged task vector, and
``mask.K.NAME`` for the K-th expert, eight elements a byte, the first in the highest bit. ``compressed.json``: the experts'
names and factors, the method, and the fingerprints of the base, without which nothing can be given back, and of those tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomerge.checkpoint.output_place import COMPRESSED, MARKS
from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import DamagedCheckpoint, UsageError, did_you_mean

FILE = MARKS[COMPRESSED]
FORMAT = 1


@dataclass(frozen=True)
class Contents:
    """The description of compressed experts.

    Attributes:
        method: ``tall`` or ``emr``.
        tasks: Name of each expert → the factor of what is given back.
        base: What the base was called.
        fingerprint: Of the base's weights.
        threshold: λ of the masks, for ``tall``.
        packed: The fingerprint of the merged vector and the masks; none in what was made before it was kept.
    """

    method: str
    tasks: Mapping[str, float]
    base: str
    fingerprint: str
    threshold: float | None = None
    packed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``compressed.json``."""
        return {
            "geomerge_compressed": FORMAT,
            "method": self.method,
            "threshold": self.threshold,
            "tasks": dict(self.tasks),
            "base": self.base,
            "fingerprint": self.fingerprint,
            "packed": self.packed,
        }

    @classmethod
    def read(cls, place: Path) -> Contents:
        """The description in a directory.

        Raises:
            UsageError: The directory holds no compressed experts.
            DamagedCheckpoint: The description is not one.
        """
        path = place / FILE
        if not path.is_file():
            raise UsageError(
                "there are no compressed experts",
                where=str(place),
                hint="geomerge compress BASE EXPERT... --out DIR makes them",
            )
        data = read_json(path, what="description")
        try:
            if data["geomerge_compressed"] != FORMAT:
                raise ValueError(f"format {data['geomerge_compressed']}")
            tasks = {str(name): float(factor) for name, factor in data["tasks"].items()}
            return cls(
                str(data["method"]),
                tasks,
                str(data["base"]),
                str(data["fingerprint"]),
                data.get("threshold"),
                data.get("packed"),
            )
        except KeyError as error:
            raise DamagedCheckpoint(
                f"the description of the compressed experts lacks the key {error}", where=str(path)
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"the description of the compressed experts is damaged: {error}", where=str(path)
            ) from None

    def number(self, task: str | int) -> int:
        """Which expert a name stands for, from 1; or the number itself.

        Raises:
            UsageError: None.
        """
        name = str(task)
        if name not in self.tasks and name.isdecimal() and 1 <= int(name) <= len(self.tasks):
            return int(name)
        if name not in self.tasks:
            raise UsageError(f"there is no expert {name!r}", hint=did_you_mean(name, self.tasks))
        return list(self.tasks).index(name) + 1


def vector(name: str) -> str:
    """What the merged task vector of a tensor is called."""
    return f"vector.{name}"


def mask(number: int, name: str) -> str:
    """What the bits of an expert are called."""
    return f"mask.{number}.{name}"
