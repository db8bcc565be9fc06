"""The models of an evaluation: identified without torch, loaded when a task asks for them, one at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.hub import is_hub_id
from geomerge.devices import placed
from geomerge.errors import ModelError, UsageError, first_line
from geomerge.evaluate.scores import ModelRow, Role
from geomerge.evaluate.task import Settings
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

    from geomerge.lab.suite import Suite

ModelLike = Any
"""A path, a hub id, or a module."""

ModelsLike = Any
"""One `ModelLike`, a sequence of paths and hub ids, or a mapping from names to any `ModelLike`."""

_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "preprocessor")


class Model:
    """One model: where it is and what it is, and itself once it is asked for.

    Args:
        name: For the tables.
        role: ``model``, ``parent`` or ``base``.
        reference: A path or hub id, `None` for a module.
        module: The module itself. It is left in its mode and on its device.
        tokenizer: For a module: its tokenizer, or the path of one; also its image processor's path.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        reference: str | None = None,
        module: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.name, self.role = name, role
        self.reference, self.module = reference, module
        self.given_tokenizer = tokenizer
        self.folder: Path | None = None
        self._loaded: dict[str, Any] = {}
        if module is not None:
            self.hash, self.parameters = _hash_module(module, tokenizer)
        else:
            assert reference is not None
            self.hash, self.parameters, self.folder = _identify(reference)

    @property
    def row(self) -> ModelRow:
        """What is said about it in the scores."""
        return ModelRow(self.name, self.reference or "memory", self.hash, self.role, self.parameters)

    def release(self) -> None:
        """Forget what was loaded."""
        self._loaded.clear()

    # -- what tasks ask for --------------------------------------------------------------------------------------------

    def causal_lm(self, settings: Settings) -> nn.Module:
        """The model as a language model, in evaluation mode.

        Raises:
            ModelError: It cannot be loaded as one.
        """
        return self._transformers("AutoModelForCausalLM", settings)

    def image_classifier(self, settings: Settings) -> nn.Module:
        """The model as an image classifier, in evaluation mode.

        Raises:
            ModelError: It cannot be loaded as one.
        """
        return self._transformers("AutoModelForImageClassification", settings)

    def of_suite(self, suite: Suite, settings: Settings) -> nn.Module:
        """The model as one of a lab suite, in evaluation mode.

        Raises:
            ModelError: It has another architecture.
        """
        if self.module is not None:
            return self.module
        key = f"suite {suite.kind}"
        if key not in self._loaded:
            assert self.folder is not None
            try:
                made = suite.load(self.folder)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                if isinstance(error, ModelError):
                    raise
                raise self._refused(f"it cannot be loaded as a model of the suite {suite.name!r}", error) from None
            self._loaded[key] = _placed(made, settings)
        return self._loaded[key]  # type: ignore[no-any-return]

    def tokenizer(self, settings: Settings) -> Any:
        """Its tokenizer.

        Raises:
            ModelError: It has none.
        """
        given = self.given_tokenizer
        if given is not None and not isinstance(given, str | Path):
            return given
        return self._preprocessor("AutoTokenizer", "tokenizer", settings)

    def image_processor(self, settings: Settings) -> Any:
        """Its image processor.

        Raises:
            ModelError: It has none.
        """
        return self._preprocessor("AutoImageProcessor", "image processor", settings)

    def _preprocessor(self, kind: str, what: str, settings: Settings) -> Any:
        import transformers

        place = self.folder if self.given_tokenizer is None else Path(self.given_tokenizer)
        if place is None:
            raise ModelError(
                f"a module in memory has no {what}",
                where=self.name,
                hint="give evaluate(..., tokenizer=...) the directory that holds it",
            )
        if kind not in self._loaded:
            try:
                self._loaded[kind] = getattr(transformers, kind).from_pretrained(
                    str(place), local_files_only=True, trust_remote_code=settings.trust_remote_code
                )
            except Exception as error:  # noqa: BLE001 - the library raises whatever a damaged file leads to
                raise self._refused(f"its {what} cannot be loaded", error) from None
        return self._loaded[kind]

    def _transformers(self, kind: str, settings: Settings) -> nn.Module:
        """Load with transformers: safetensors only, no code of the model's unless it was allowed."""
        if self.module is not None:
            return self.module
        if kind not in self._loaded:
            import torch
            import transformers

            dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
            try:
                with quiet_transformers():
                    made, report = getattr(transformers, kind).from_pretrained(
                        str(self.folder),
                        dtype=dtype,
                        local_files_only=True,
                        use_safetensors=True,
                        trust_remote_code=settings.trust_remote_code,
                        output_loading_info=True,
                    )
            except Exception as error:  # noqa: BLE001 - see above
                raise self._refused(f"it cannot be loaded by {kind}", error) from None
            missing = sorted(report["missing_keys"])
            if missing:
                # They would be filled with random numbers.
                raise ModelError(
                    f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""),
                    where=self.reference,
                    hint=f"a model for {kind} has to hold them",
                )
            self._loaded[kind] = _placed(made, settings)
        return self._loaded[kind]  # type: ignore[no-any-return]

    def _refused(self, what: str, error: Exception) -> ModelError:
        hint = None
        if "trust_remote_code" in str(error):
            hint = "the model brings its own code; --trust-remote-code runs it"
        return ModelError(f"{what}: {first_line(error)}", where=self.reference or self.name, hint=hint)


def _placed(module: nn.Module, settings: Settings) -> nn.Module:
    """The module on its device, in its dtype, in evaluation mode.

    Raises:
        UsageError: There is no such device.
        RunError: It has no room for the model.
    """
    import torch

    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return placed(module, settings.device, dtype)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in evaluation mode and takes no gradients; afterwards every part is in the mode that it had."""
    import torch

    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def line_up(models: ModelsLike, parents: ModelsLike, base: ModelsLike | None, *, tokenizer: Any = None) -> list[Model]:
    """All models of an evaluation, each once: models, parents, base.

    A model that is also a parent or the base appears as that.

    Args:
        models, parents, base: See `ModelsLike`.
        tokenizer: For modules; by default that of the first model that is a directory.

    Raises:
        ModelError: One cannot be opened.
        UsageError: There is none, or it is nothing that can be a model.
    """
    given: list[tuple[str, ModelLike, Role]] = []
    for some, role in ((models, "model"), (parents, "parent"), ({} if base is None else base, "base")):
        given += [(name, model, role) for name, model in _named(some)]  # type: ignore[misc]
    taken = {_identity(model) for _, model, role in given if role != "model"}
    kept: list[tuple[str, ModelLike, Role]] = []
    for name, model, role in given:
        if role == "model" and _identity(model) in taken:
            continue
        if any(_identity(model) == _identity(other) for _, other, _ in kept):
            continue
        kept.append((name, model, role))
    if not kept:
        raise UsageError("no model was given")
    if tokenizer is None:
        tokenizer = next((m for _, m, _ in kept if isinstance(m, str | Path) and Path(m).is_dir()), None)
    made = []
    for name, (_, model, role) in zip(_unique(kept), kept):
        if isinstance(model, str | Path):
            made.append(Model(name, role, reference=str(model)))
        else:
            made.append(Model(name, role, module=model, tokenizer=tokenizer))
    return made


def _identity(model: ModelLike) -> object:
    return str(model) if isinstance(model, str | Path) else id(model)


def _named(models: ModelsLike) -> list[tuple[str, ModelLike]]:
    """Models with the names that they are called by unless two are called the same."""
    if isinstance(models, str | Path):
        return [(_short(str(models)), models)]
    if isinstance(models, Mapping):
        return [(str(name), _checked(model)) for name, model in models.items()]
    if isinstance(models, Sequence):
        return [pair for model in models for pair in _named(model)]
    return [(type(models).__name__, _checked(models))]


def _checked(model: ModelLike) -> ModelLike:
    if isinstance(model, str | Path) or hasattr(model, "state_dict"):
        return model
    raise UsageError(f"a model is a path, a hub id or a torch module, not {type(model).__name__}")


def _short(reference: str) -> str:
    """The last part of a path, a hub id as it is."""
    path = Path(reference).expanduser()
    if is_hub_id(reference):
        return reference
    # Links keep their own names; only `.` and `..` are called by what they are.
    return path.name if path.name not in ("", "..") else path.resolve().name


def _unique(given: Sequence[tuple[str, ModelLike, Role]]) -> list[str]:
    """Names of which no two are the same: the whole path where the last part does not do, then a number."""
    names = [name for name, _, _ in given]
    names = [
        str(model) if names.count(name) > 1 and isinstance(model, str | Path) else name
        for name, (_, model, _) in zip(names, given)
    ]
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]


# -- identity ----------------------------------------------------------------------------------------------------------


def _identify(reference: str) -> tuple[str, int, Path]:
    """Hash, number of parameters and directory of a model on disk. Reads headers, samples of the weights, side files."""
    from geomerge.checkpoint.folder import LoneAdapter
    from geomerge.checkpoint.reader import open_checkpoint
    from geomerge.recipe.references import parse_reference
    from geomerge.recipe.values import NOWHERE

    def adapter(model: str) -> ModelError:
        return ModelError(
            "an adapter cannot be evaluated without being merged first",
            where=reference,
            hint=f"merge it: a recipe with `merge_method: passthrough` and `models: [{{model: {model}}}]`",
        )

    named = parse_reference(reference, NOWHERE)
    if named.lora is not None:
        raise adapter(reference)
    try:
        opened = open_checkpoint(named.path, named.revision, subfolder=named.subfolder)
    except LoneAdapter:
        raise adapter(f"BASE+{reference}") from None
    with opened as checkpoint:
        if checkpoint.folder is None:
            raise ModelError(
                "a single file of weights has no config", where=reference, hint="give the model's directory"
            )
        digest = hashlib.sha256(checkpoint.fingerprint().encode())
        config = {k: v for k, v in (checkpoint.config or {}).items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True).encode())
        _digest_tokenizer(digest, checkpoint.folder)
        parameters = sum(map(math.prod, checkpoint.shapes.values()))
        return digest.hexdigest()[:32], parameters, checkpoint.folder


def _digest_tokenizer(digest: Any, folder: Path) -> None:
    """Add the files of a directory's tokenizer and processor to a digest."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.is_file() and file.name.startswith(_TOKENIZER):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())


def _hash_module(module: nn.Module, tokenizer: Any) -> tuple[str, int]:
    """Hash and number of parameters of a module: class, config, tokenizer, and every bit of its state."""
    from geomerge.checkpoint.fingerprint import tensor_bytes

    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\n".encode())
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):
        plain = {k: v for k, v in config.to_diff_dict().items() if not k.startswith("_")}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    if isinstance(tokenizer, str | Path):
        _digest_tokenizer(digest, Path(tokenizer))
    elif hasattr(tokenizer, "get_vocab"):
        described = [tokenizer.get_vocab(), getattr(tokenizer, "chat_template", None)]
        digest.update(json.dumps(described, sort_keys=True).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32], sum(p.numel() for p in module.parameters())
