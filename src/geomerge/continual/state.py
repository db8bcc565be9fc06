"""The state of a continual merge: a model directory with ``continual/`` in it.

    STATE/
      config.json, model.safetensors, …      the merged model
      continual/state.json                   the rule, its parameters, the base, the experts so far, counters
      continual/model.safetensors            the running sum of task vectors, float64

Both are replaced together, by the one rename that gives an output its name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.output_place import MARKS, STATE
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.strict_json import read_json
from geomerge.continual.rules import RULES, Rule
from geomerge.engine.manifest import versions
from geomerge.engine.plan import InputModel
from geomerge.errors import DamagedCheckpoint, GeomergeError, UsageError
from geomerge.version import __version__

FILE = MARKS[STATE]
FOLDER = FILE.partition("/")[0]
FORMAT = 1
"""The version of ``state.json``. A state of another version is refused, not guessed at."""


@dataclass(frozen=True)
class Known:
    """A model that took part.

    Attributes:
        model: Its hub id or the last part of its path; BASE+ADAPTER where an adapter was added.
        fingerprint: `Checkpoint.fingerprint`.
        path: Where it was found (kept for the base only, which every step reads).
        revision, licence: If it has them.
    """

    model: str
    fingerprint: str
    path: str = ""
    revision: str | None = None
    licence: str | None = None

    @classmethod
    def of(cls, model: InputModel, *, path: bool = False) -> Known:
        """What is kept of a plan's input."""
        place = f"{model.path}+{model.adapter}" if model.adapter else model.path
        return cls(model.name, model.fingerprint, place if path else "", model.revision, model.licence)


@dataclass(frozen=True)
class State:
    """What is known after some experts.

    Attributes:
        rule: How experts are taken in.
        base: θ₀.
        experts: In their order.
        norms: Σ ‖τ_t‖.
        factor: What the sum is multiplied by in the merged model.
        sum: The fingerprint of the sum's file.
    """

    rule: Rule
    base: Known
    experts: tuple[Known, ...] = ()
    norms: float = 0.0
    factor: float = 1.0
    sum: str = ""

    @property
    def count(self) -> int:
        """The number of experts so far."""
        return len(self.experts)

    def to_json(self) -> dict[str, Any]:
        """The content of ``state.json``."""
        return {
            "geomerge_continual": FORMAT,
            "geomerge": __version__,
            "versions": versions(),
            "method": self.rule.name,
            "parameters": self.rule.values(),
            "base": asdict(self.base),
            "experts": [asdict(expert) for expert in self.experts],
            "norms": self.norms,
            "factor": self.factor,
            "sum": self.sum,
        }

    @classmethod
    def read(cls, place: Path) -> State | None:
        """The state of a directory; `None` where there is nothing yet.

        Raises:
            UsageError: Something else is there.
            DamagedCheckpoint: It is a state, but not a sound one.
        """
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            aside = sorted(place.parent.glob(f".{place.name}.replaced-*")) if place.parent.is_dir() else []
            if aside:
                raise UsageError(
                    f"an interrupted step left the state in {aside[-1].name}",
                    where=str(place),
                    hint=f"rename it back: mv {aside[-1]} {place}",
                )
            return None
        path = place / FILE
        if not path.is_file():
            raise UsageError(
                "is there and is not the state of a continual merge",
                where=str(place),
                hint="`continue` begins a state of its own: give it a new directory (and the base)",
            )
        data = read_json(path, what=FILE)
        if data.get("geomerge_continual") != FORMAT:
            raise UsageError(f"is not a state of format {FORMAT}", where=str(path), hint="start anew from the base")
        try:
            rule = RULES[data["method"]].make(data["parameters"], count=1)
            assert isinstance(rule, Rule)
            return cls(
                rule,
                Known(**data["base"]),
                tuple(Known(**expert) for expert in data["experts"]),
                float(data["norms"]),
                float(data["factor"]),
                str(data["sum"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, GeomergeError) as error:
            raise DamagedCheckpoint(
                f"{FILE} is damaged: {type(error).__name__}: {error}", where=str(path), hint="start anew from the base"
            ) from None

    def open_sum(self, place: Path) -> Checkpoint:
        """The running sum.

        Raises:
            DamagedCheckpoint: It is not the one that this state was written with.
        """
        checkpoint = open_checkpoint(str(place / FOLDER))
        if checkpoint.fingerprint() != self.sum:
            checkpoint.close()
            raise DamagedCheckpoint(
                "the running sum is not the one that state.json was written with",
                where=str(place / FOLDER),
                hint="restore both from one copy, or start anew from the base",
            )
        return checkpoint
