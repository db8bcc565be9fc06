"""From a recipe to a plan: which tensors there will be, and what each is made from.

Everything that can be wrong with a recipe and its models is found here, before a byte is written: missing tensors, shapes
that differ, vocabularies that do not fit, parameters that are out of range, filters that match nothing. Every tensor of
every parent is accounted for: it is merged, copied by a stated rule, left out by a stated rule, or the plan is refused.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.collector import collector_paused
from geomerge.engine.chain import same_draws
from geomerge.engine.models import Models
from geomerge.engine.output import licence_of
from geomerge.engine.plan import InputModel, Node, Plan, Rotation, Rows, Stage, Transform
from geomerge.engine.stage import RecipePlan
from geomerge.methods import registry
from geomerge.recipe.values import Pipeline


@collector_paused()
def make_plan(
    pipeline: Pipeline, *, models: Mapping[str, Checkpoint] | None = None, allow_pickle: bool = False
) -> tuple[Plan, list[Checkpoint]]:
    """Resolve a recipe against its models.

    Args:
        pipeline: What `geomerge.recipe.load` gives.
        models: Models in memory by the name that the recipe uses.
        allow_pickle: Read pickled weights (weights only).

    Returns:
        The plan, and the opened inputs in its order (the caller closes them).

    Raises:
        RecipeError: The recipe asks for what cannot be done; the line is named.
        ModelError: A model cannot be used, or the models do not fit.
    """
    opened = Models(models, allow_pickle=allow_pickle)
    try:
        with contextlib.ExitStack() as scratch:
            return Planner(pipeline, opened, scratch).plan(), opened.inputs
    except BaseException:
        for checkpoint in opened.inputs:
            checkpoint.close()
        raise


class Planner:
    """Collects the nodes of all recipes of a pipeline, and all that they refer to."""

    def __init__(self, pipeline: Pipeline, models: Models, scratch: contextlib.ExitStack) -> None:
        self.pipeline, self.models, self._scratch = pipeline, models, scratch
        self.nodes: list[Node] = []
        self.rows: list[Rows] = []
        self.transforms: list[Transform] = []
        self.rotations: list[Rotation] = []
        self.alignment: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = list(pipeline.notes)
        self.laid_out: dict[Path, Path | str] = {}

    def plan(self) -> Plan:
        stages = []
        for index, recipe in enumerate(self.pipeline.recipes):
            stage = RecipePlan(self, recipe, index)
            made = stage.nodes()
            stages.append(
                Stage(recipe.name, registry.get(recipe.method).name, recipe.seed, recipe.rounding, recipe.compat)
            )
            if recipe is not self.pipeline.output:
                assert recipe.name is not None
                self.models.add_stage(recipe.name, stage.as_model(made))
        config, copies, texts, notes = stage.describe(made)
        self.notes += notes
        drawn = same_draws(self.nodes, self.pipeline.recipes)
        self.notes += [] if drawn is None else [drawn]
        inputs = tuple(input_model(c) for c in self.models.inputs)
        self.notes += _copies_of_each_other(inputs)
        return Plan(
            inputs=inputs,
            stages=tuple(stages),
            nodes=tuple(self.nodes),
            outputs=tuple(made),
            left_out=self.left_out,
            rows=tuple(self.rows),
            config=config,
            copies={name: str(path) for name, path in copies.items()},
            texts=texts,
            recipe=self.pipeline.output.text,
            notes=self._portable_notes(),
            transforms=tuple(self.transforms),
            rotations=tuple(self.rotations),
            alignment=tuple(self.alignment),
        )

    def _portable_notes(self) -> tuple[str, ...]:
        """The notes, each once, with the recipe's name in place of its path: they go into the output and the hash."""
        path = self.pipeline.output.where.file
        return tuple(dict.fromkeys(note.replace(f"{path}:", f"{Path(path).name}:") for note in self.notes))

    def lay_out(self, copies: Mapping[str, Path], texts: Mapping[str, str]) -> Path:
        """Put a stage's tokenizer and other side files into a directory that lives as long as the planning: later stages
        read them as they read a model's. `laid_out` says what each file really is."""
        folder = Path(self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="geomerge-"))).resolve()
        files: dict[str, Path | str] = {**copies, **texts}
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
            self.laid_out[path] = content
        return folder


def _copies_of_each_other(inputs: Iterable[InputModel]) -> list[str]:
    first: dict[str, str] = {}
    return [
        f"{known} and {each.ref} seem to hold the same weights"
        for each in inputs
        if (known := first.setdefault(each.fingerprint, each.ref)) != each.ref
    ]


def _located(path: Path | None) -> str:
    """Where a directory is, by the names that the user knows: a link is not followed."""
    if path is None:
        return ""
    return str(path.resolve() if ".." in path.parts else path.absolute())


def input_model(checkpoint: Checkpoint) -> InputModel:
    """What a plan says of an opened model."""
    return InputModel(
        ref=checkpoint.ref,
        path=_located(checkpoint.path),
        adapter=_located(checkpoint.adapter),
        hub_id=checkpoint.hub_id,
        revision=checkpoint.revision,
        files=tuple((f.path.name, f.size, f.header_sha256) for f in checkpoint.files),
        fingerprint=checkpoint.fingerprint(),
        licence=licence_of(checkpoint),
    )
