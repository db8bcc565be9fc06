"""``module.py:function``: a task of the user's own. Naming it runs its file, as ``python module.py`` would.

The function gets the loaded model and the settings and returns a float, an array with one value for each sample, or a
mapping with ``values`` and, if it likes, ``hashes`` (what each sample is) and ``weights``. Attributes of the function say more:

    def reversal(model, tokenizer):        # asked for by name: model, tokenizer, path, settings
        return [answer(model, tokenizer, q) == a for q, a in QUESTIONS]

    reversal.metric = "accuracy"           # by default "score"
    reversal.higher_is_better = True       # by default True
    reversal.chance = 0.1
    reversal.kind = "image-classification" # by default "causal-lm"; "path": no model is loaded
    reversal.version = "1"                 # without one its scores are not cached
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomerge.errors import DataError, GeomergeError, RunError, UsageError, did_you_mean
from geomerge.evaluate.models import Model, evaluating
from geomerge.evaluate.samples import Samples, hash_text
from geomerge.evaluate.task import Settings, Tick

_ASKED = ("model", "tokenizer", "path", "settings")
_KINDS = ("causal-lm", "image-classification", "path")


@dataclass(frozen=True)
class CallableTask:
    """A function that scores a model.

    Attributes:
        function: See this module.
        name: What it is called in the tables.
        digest: Of the file that it is from, or empty.
    """

    function: Callable[..., Any] = field(repr=False)
    name: str
    digest: str = ""

    source = "python"

    @property
    def version(self) -> str | None:
        """The function's own version with its file's hash: without one nobody can tell what it depends on."""
        own = getattr(self.function, "version", None)
        return None if own is None else hash_text(str(own), self.digest)

    @property
    def metric(self) -> str:
        return str(getattr(self.function, "metric", "score"))

    @property
    def higher_is_better(self) -> bool:
        return bool(getattr(self.function, "higher_is_better", True))

    @property
    def chance(self) -> float | None:
        found = getattr(self.function, "chance", None)
        return None if found is None else float(found)

    def prepare(self, settings: Settings) -> None:
        """Check what the function asks for."""
        self._wanted()
        if self._kind() not in _KINDS:
            raise UsageError(f"{self.name}: kind is {self._kind()!r}", hint=f"it is one of: {', '.join(_KINDS)}")

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`."""
        wanted = self._wanted()
        given: dict[str, Any] = {"settings": settings, "path": model.folder}
        if "tokenizer" in wanted:
            given["tokenizer"] = model.tokenizer(settings)
        try:
            if "model" not in wanted or self._kind() == "path":
                found = self.function(**{name: given.get(name) for name in wanted})
            else:
                images = self._kind() == "image-classification"
                module = model.image_classifier(settings) if images else model.causal_lm(settings)
                with evaluating(module):
                    found = self.function(**{name: given.get(name, module) for name in wanted})
        except GeomergeError:
            raise
        except Exception as error:
            raise RunError(f"the function failed: {type(error).__name__}: {error}", where=self.name) from error
        return _samples(found, self.name, self.metric)

    def _kind(self) -> str:
        return str(getattr(self.function, "kind", "causal-lm"))

    def _wanted(self) -> list[str]:
        """The parameters that the function asks for; a single one of another name is the model."""
        parameters = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        unknown = [name for name in parameters if name not in _ASKED]
        if unknown:
            raise UsageError(
                f"{self.name} asks for {unknown[0]!r}", hint=f"a task's function can ask for: {', '.join(_ASKED)}"
            )
        return parameters


def is_callable(reference: str) -> bool:
    """Whether a task's reference is ``module.py:function``."""
    file, colon, _ = reference.rpartition(":")
    return bool(colon) and file.endswith(".py")


def callable_task(reference: str) -> CallableTask:
    """The task of a reference ``module.py:function``; runs the file.

    Raises:
        DataError: There is no such file.
        UsageError: It has no such function.
        RunError: It fails when it is run.
    """
    text, _, function = reference.rpartition(":")
    path = Path(text).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", where=text, hint="a task of your own is named FILE.py:FUNCTION")
    source = path.read_bytes()
    name = f"geomerge_user_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for it there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RunError(f"the file fails: {type(error).__name__}: {error}", where=text) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"the file has no function {function!r}", where=text, hint=did_you_mean(function, names))
    return CallableTask(found, f"{path.name}:{function}", hashlib.sha256(source).hexdigest()[:16])


def _samples(found: Any, name: str, metric: str) -> Samples:
    """Samples from whatever the function returned."""
    import numpy as np

    weights = hashes = None
    if isinstance(found, Mapping):
        if "values" not in found:
            raise RunError("the function's mapping has no 'values'", where=name)
        found, weights, hashes = found["values"], found.get("weights"), found.get("hashes")
    if found is None:
        raise RunError("the function returned nothing", where=name, hint="does it lack a `return`?")
    if hasattr(found, "detach"):
        found = found.detach().cpu().double().numpy()
    try:
        values = np.atleast_1d(np.asarray(found, np.float64))
    except (TypeError, ValueError) as error:
        raise RunError(f"the function returned something that is no numbers: {error}", where=name) from None
    if values.ndim != 1:
        raise RunError(f"the function returned values of shape {values.shape}, not one a sample", where=name)
    if not len(values):
        raise RunError("the function returned no values: there must be one a sample", where=name)
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RunError(f"the function returned {values[first]} for sample {first + 1} of {len(values)}", where=name)
    if metric == "accuracy" and not ((values >= 0) & (values <= 1)).all():
        outside = values[(values < 0) | (values > 1)][0]
        raise RunError(
            f"the function returned {outside:g} as an accuracy",
            where=name,
            hint="accuracies lie in 0 to 1; set the function's attribute `metric` to another name for anything else",
        )
    names = [str(i) for i in range(len(values))] if hashes is None else [str(h) for h in hashes]
    return Samples.of(values, (hash_text(n) for n in names), weights=weights)
