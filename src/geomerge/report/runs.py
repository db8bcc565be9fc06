"""A merge that was done, read from its directory: manifest, recipe, and the headers of its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomerge.errors import DamagedCheckpoint, ModelError, UsageError

_RECIPE_LIMIT = 4 << 20


@dataclass(frozen=True)
class Timing:
    """What a run took, as ``geomerge merge --json`` prints it.

    Attributes:
        seconds: Of the merge.
        peak_memory: Bytes of memory at its peak, when that was measured.
    """

    plan: str
    seconds: float
    peak_memory: int | None = None


@dataclass(frozen=True)
class Run:
    """One merged model.

    Attributes:
        path: The directory.
        manifest: ``geomerge.json``.
        recipe: The recipe's text; empty when it is not there.
        config: The model's ``config.json``.
        shapes: Tensor → shape; empty shapes when the weights are not there.
        nbytes: Of the weights, `None` when they are not there.
        parameters: How many numbers, `None` when the weights are not there.
        timing: What the run took, if that was recorded.
    """

    path: Path
    manifest: Mapping[str, Any]
    recipe: str
    config: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    nbytes: int | None = None
    parameters: int | None = None
    timing: Timing | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def method(self) -> str:
        """The method of the last stage."""
        return str(self.manifest["stages"][-1]["method"])

    @property
    def inputs(self) -> list[Mapping[str, Any]]:
        """The parents, as the manifest has them."""
        return list(self.manifest["inputs"])

    @property
    def parents(self) -> list[str]:
        """The parents' names, BASE+ADAPTER where an adapter was added."""
        return [f"{i['model']}+{i['adapter']}" if i.get("adapter") else str(i["model"]) for i in self.inputs]

    @property
    def rounding_loss(self) -> float | None:
        """The share of the task vectors' norm that rounding took."""
        found = self.manifest.get("rounding_loss")
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def read_run(folder: Path) -> Run:
    """Read a merged model's record.

    Raises:
        UsageError: The directory has no ``geomerge.json``.
        ModelError: A file of it is damaged.
    """
    from geomerge.checkpoint.folder import check_contained
    from geomerge.checkpoint.strict_json import read_json

    place = folder / "geomerge.json"
    if not place.is_file():
        raise UsageError(
            "this directory has no geomerge.json: it was not merged by geomerge",
            where=str(folder),
            hint="give a directory that `geomerge merge` made, or a scores.json that `geomerge evaluate` wrote",
        )
    check_contained(place, folder)
    manifest = read_json(place, what="the manifest")
    _check(manifest, str(place))
    recipe = folder / "geomerge.yml"
    text = ""
    if recipe.is_file():
        check_contained(recipe, folder)
        with recipe.open("rb") as file:
            text = file.read(_RECIPE_LIMIT).decode("utf-8", "replace")
    shapes, config, nbytes, parameters = _weights(folder, manifest)
    return Run(folder, manifest, text, config, shapes, nbytes, parameters)


def _weights(
    folder: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any] | None, int | None, int | None]:
    """Shapes, config, bytes and parameters; a report on a record without weights is still a report."""
    from geomerge import anatomy
    from geomerge.checkpoint.reader import open_checkpoint

    try:
        with open_checkpoint(str(folder)) as checkpoint:
            found = anatomy.read(checkpoint.shapes, checkpoint.config)
            total = anatomy.summary(found, checkpoint.shapes, {})["parameters"]
            return checkpoint.shapes, checkpoint.config, checkpoint.nbytes, int(total)
    except ModelError:
        return dict.fromkeys(manifest["tensors"], ()), None, None, None


def _check(manifest: Mapping[str, Any], where: str) -> None:
    """Refuse a manifest that the report could not read.

    Raises:
        DamagedCheckpoint: Naming what is wrong.
    """

    def need(right: bool, what: str) -> None:
        if not right:
            raise DamagedCheckpoint(f"the manifest is damaged: {what}", where=where)

    kinds = {"inputs": list, "stages": list, "methods": list, "tensors": dict, "plan": str, "geomerge": str}
    for key, kind in kinds.items():
        need(isinstance(manifest.get(key), kind), f"{key!r} is missing or not of the right type")
    for key, kind in {"versions": dict, "notes": list, "left_out": dict}.items():
        need(isinstance(manifest.get(key, kind()), kind), f"{key!r} is not of the right type")
    need(bool(manifest["stages"]), "there are no stages")
    for stage in manifest["stages"]:
        need(isinstance(stage, dict) and isinstance(stage.get("method"), str), "a stage has no method")
    for model in manifest["inputs"]:
        need(isinstance(model, dict) and isinstance(model.get("model"), str), "an input has no name")
        need(isinstance(model.get("adapter", ""), str), "an input's adapter is not text")
        need(isinstance(model.get("fingerprint", ""), str), "an input's fingerprint is not text")
        need(isinstance(model.get("revision"), str | None), "an input's revision is not text")
    for method in manifest["methods"]:
        need(isinstance(method, dict) and isinstance(method.get("parameters"), dict), "a method has no parameters")
        need(isinstance(method.get("name"), str), "a method has no name")
    for name, entry in manifest["tensors"].items():
        need(isinstance(entry, dict), f"the tensor {name!r} has no entry")
        index = entry.get("method")
        need(
            index is None or (type(index) is int and 0 <= index < len(manifest["methods"])),
            f"the tensor {name!r} names a method that is not there",
        )
        numbers = entry.get("coefficients", [])
        need(isinstance(numbers, list) and all(map(_number, numbers)), f"the coefficients of {name!r} are not numbers")
        need(_number(entry.get("rounding_loss", 0)), f"the rounding loss of {name!r} is not a number")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_timing(data: Mapping[str, Any], where: str) -> Timing:
    """What ``geomerge merge --json`` printed.

    Raises:
        UsageError: It is something else.
    """
    plan, seconds, peak = data.get("plan"), data.get("seconds"), data.get("peak_memory")
    if not isinstance(plan, str) or not _number(seconds) or not (peak is None or type(peak) is int):
        raise UsageError("it is neither scores nor the output of `geomerge merge --json`", where=where)
    return Timing(plan, float(seconds), peak)  # type: ignore[arg-type]


def is_timing(data: Any) -> bool:
    """Whether parsed JSON looks like the output of ``geomerge merge --json``."""
    return isinstance(data, dict) and {"plan", "seconds", "out"} <= data.keys() and "kind" not in data


def parse(text: str) -> Any:
    """JSON as Python values, `None` when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
