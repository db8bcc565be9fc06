"""The models of a recipe as the planner sees them: opened checkpoints, and the results of earlier stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from geomerge import anatomy
from geomerge.anatomy import Anatomy
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.hub import is_hub_id
from geomerge.engine.adapted import open_model
from geomerge.engine.plan import Operand
from geomerge.errors import IncompatibleModels, ModelError, RecipeError, together
from geomerge.recipe.values import ModelRef
from geomerge.tokens.vocabulary import Vocabulary


class Kind(NamedTuple):
    """A tensor's dtype (safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(eq=False)
class Model:
    """A parent: its tensors, what each of them is, and where a plan gets them from.

    Attributes:
        ref: As the recipe names it.
        tensors: Name → dtype and shape.
        anatomy: What each tensor is.
        config: Its ``config.json``.
        operand: Makes the operand of one tensor.
        checkpoint: The opened files; `None` for the result of an earlier stage.
        folder: Where its tokenizer and other side files lie; `None` when it has none.
        vocabulary: Its tokenizer's, read when first asked for.
        own: For a model that goes by another one's names: those → its own.
    """

    ref: ModelRef
    tensors: Mapping[str, Kind]
    anatomy: Anatomy
    config: dict[str, Any] | None
    operand: Callable[[str], Operand]
    checkpoint: Checkpoint | None
    folder: Path | None
    own: Mapping[str, str] = field(default_factory=dict)
    _vocabulary: list[Vocabulary | None] = field(default_factory=list)

    def __str__(self) -> str:
        return str(self.ref)

    def find(self, name: str) -> str | None:
        """The stored name of a tensor: its own, or the one that a tied name stands for; `None` when it is not there."""
        if name in self.anatomy.tied and self.anatomy.tied[name] in self.tensors:
            return self.anatomy.tied[name]
        if name in self.tensors:
            return name
        return next((a for a, s in self.anatomy.tied.items() if s == name and a in self.tensors), None)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where its tokenizer lies: its folder, unless an adapter brings another."""
        return self.checkpoint.tokenizer_folder if self.checkpoint is not None else self.folder

    @property
    def vocabulary(self) -> Vocabulary | None:
        if not self._vocabulary:
            self._vocabulary.append(Vocabulary.load(self.tokenizer_folder) if self.tokenizer_folder else None)
        return self._vocabulary[0]

    @property
    def codes(self) -> str | None:
        """What a user should know of a model that is stored as codes."""
        if self.checkpoint is None or not self.checkpoint.coded or self.checkpoint.quantization is None:
            return None
        scheme = _scheme(self.checkpoint.quantization)
        return f"{self} is quantised ({scheme}) and decoded for the merge; its original 16-bit model makes a better one"

    def embedding_rows(self) -> int | None:
        """Rows of the largest matrix over the vocabulary."""
        sizes = [
            self.tensors[name].shape[axis] for name, axis in self.anatomy.vocabulary.items() if name in self.tensors
        ]
        return max(sizes, default=None)


class Models:
    """Opens each model once, whatever its number of mentions; anatomies are shared between equal layouts.

    Args:
        given: Models in memory by the name that the recipe uses.
        allow_pickle: Read pickled weights (weights only).
    """

    def __init__(self, given: Mapping[str, Checkpoint] | None = None, *, allow_pickle: bool = False) -> None:
        self.inputs: list[Checkpoint] = []
        self._given = given or {}
        self._allow_pickle = allow_pickle
        self._models: dict[ModelRef, Model] = {}
        self._stages: dict[str, Model] = {}
        self._anatomies: list[tuple[dict[str, tuple[int, ...]], Any, Anatomy]] = []

    def add_stage(self, name: str, model: Model) -> None:
        """Make an earlier recipe's result known under its name."""
        self._stages[name] = model

    def get(self, ref: ModelRef, where: object = None) -> Model:
        """A model; `where` a recipe names it, if one does.

        Raises:
            RecipeError: It asks for an adapter on an earlier document's result.
            ModelError: It cannot be opened, or is quantised.
        """
        if ref.lora is not None:
            made = next((r for r in (ref, ref.lora) if r.revision is None and r.path in self._stages), None)
            if made is not None:
                raise RecipeError(
                    f"{ref}: {made.path} is an earlier document of this recipe, and an adapter goes with a model on disk",
                    where=str(where),
                    hint="give each model its adapter where the earlier document names it",
                )
        elif ref.revision is None and ref.path in self._stages:
            return self._stages[ref.path]
        if ref not in self._models:
            try:
                self._models[ref] = self._open(ref)
            except ModelError as error:
                error.where = ": ".join(filter(None, (str(where or ""), error.where)))
                raise
        return self._models[ref]

    def open_all(self, named: Iterable[tuple[ModelRef, object]]) -> None:
        """Open the models of a recipe, each with the place that names it, so that one problem does not hide the next.

        Nothing is downloaded once there is a problem.

        Raises:
            ModelError: Of the first that cannot be opened; what is wrong with others stands in the hint.
        """
        problems: list[ModelError] = []
        for ref, where in named:
            remote = any(is_hub_id(r.path) and not Path(r.path).expanduser().exists() for r in (ref, ref.lora) if r)
            if problems and remote:
                continue
            try:
                self.get(ref, where)
            except ModelError as error:
                problems.append(error)
        if problems:
            raise together(problems)

    def _open(self, ref: ModelRef) -> Model:
        checkpoint = open_model(ref, given=self._given, allow_pickle=self._allow_pickle)
        if checkpoint.decoding.refusal is not None:
            assert checkpoint.quantization is not None
            raise IncompatibleModels(
                f"the model is quantised ({_scheme(checkpoint.quantization)}) and cannot be decoded: "
                f"{checkpoint.decoding.refusal}; merging its codes would destroy it",
                where=str(ref),
                hint="name the original 16-bit model, or dequantise it first",
            )
        index = len(self.inputs)
        self.inputs.append(checkpoint)
        tensors = {name: Kind(checkpoint.dtype(name), each.shape) for name, each in checkpoint.logical.items()}
        return Model(
            ref=ref,
            tensors=tensors,
            anatomy=self.anatomy(tensors, checkpoint.config),
            config=plain_config(checkpoint.config) if checkpoint.coded else checkpoint.config,
            operand=lambda name: Operand(index, name),
            checkpoint=checkpoint,
            folder=checkpoint.folder,
        )

    def anatomy(self, tensors: Mapping[str, Kind], config: dict[str, Any] | None) -> Anatomy:
        """What each tensor is; models with the same names, shapes and family share the answer."""
        shapes = {name: kind.shape for name, kind in tensors.items()}
        key = _family_key(config)
        for known, family, found in self._anatomies:
            if family == key and known == shapes:
                return found
        found = anatomy.read(shapes, config)
        self._anatomies.append((shapes, key, found))
        return found


def _family_key(config: dict[str, Any] | None) -> Any:
    """The parts of a config that an anatomy depends on: everything but what training wrote there."""
    if config is None:
        return None
    return {
        k: v for k, v in config.items() if k not in ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
    }


def plain_config(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The config of the decoded model: it says nothing of codes any more."""
    if config is None:
        return None
    found = {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}
    return {k: plain_config(v) if isinstance(v, dict) else v for k, v in found.items()}


def _scheme(quantization: Mapping[str, Any]) -> str:
    return str(quantization.get("quant_method") or quantization.get("format") or "codes with scales")
