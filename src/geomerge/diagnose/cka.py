"""Linear CKA of hidden states: do two models represent the same texts alike, layer by layer?

    CKA(X, Y) = ‖X̃ᵀỸ‖²_F / (‖X̃ᵀX̃‖_F ‖ỸᵀỸ‖_F),  X̃, Ỹ centred over the samples

The samples are the tokens of the probe texts where both models cut them into the same number of tokens, else the mean over
each text's tokens. Nothing but the sums of X, Y, XᵀX, XᵀY, YᵀY is kept, in float64: memory does not grow with the probe. They
are d×d for every layer; when they would take more than `BUDGET` bytes, evenly spread layers are compared instead of all.

This is the one part of a diagnosis that loads the models (through transformers), so it is done only when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geomerge.devices import placed
from geomerge.errors import ModelError, UsageError, first_line
from geomerge.late import without_gradients
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor


BUDGET = 1 << 30
"""Bytes that the sums may take."""

LONGEST = 256
"""Tokens of a text that are read."""


@dataclass(frozen=True)
class LayerSimilarity:
    """CKA of a pair over depth.

    Attributes:
        layers: The hidden states that were compared: 0 is the embedding's output, i the output of block i − 1.
        values: Their CKA.
        samples: How many samples each value rests on.
        unit: ``tokens`` or ``texts``: what a sample is.
    """

    layers: tuple[int, ...]
    values: tuple[float, ...]
    samples: int
    unit: str

    @property
    def mean(self) -> float:
        """The mean over the layers."""
        return math.fsum(self.values) / len(self.values)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "mean": self.mean,
            "layers": list(self.layers),
            "values": list(self.values),
            "samples": self.samples,
            "unit": self.unit,
        }


def read_probe(path: str | Path | None = None) -> list[str]:
    """The texts of a probe file: paragraphs where it has empty lines, else lines. Without a path the built-in ones.

    Raises:
        UsageError: The file cannot be read, is empty, or is not UTF-8.
    """
    if path is None:
        text = resources.files("geomerge.diagnose").joinpath("probe.txt").read_text("utf-8")
    else:
        try:
            text = Path(path).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the probe file is not UTF-8: {error.reason} at byte {error.start}",
                where=str(path),
                hint="convert it: iconv -f LATIN1 -t UTF-8 FILE",
            ) from None
        except OSError as error:
            raise UsageError(f"the probe file cannot be read: {error.strerror}", where=str(path)) from None
    paragraphs = [p.strip("\n") for p in text.replace("\r\n", "\n").split("\n\n") if p.strip()]
    samples = paragraphs if len(paragraphs) > 1 else [line.strip() for line in text.splitlines() if line.strip()]
    if len(samples) < 2:
        what = "is empty" if not samples else "holds only one sample"
        raise UsageError(
            f"the probe file {what}",
            where=None if path is None else str(path),
            hint="one sample a line, or paragraphs with empty lines between them; a few dozen varied ones",
        )
    return samples


@dataclass
class Moments:
    """Running sums of two sets of features of the same samples.

    Attributes:
        count: Samples so far.
        sum_x, sum_y: Shape ``(d_x,)``, ``(d_y,)``.
        xx, xy, yy: Shape ``(d_x, d_x)``, ``(d_x, d_y)``, ``(d_y, d_y)``.
    """

    count: int = 0
    sum_x: Any = 0.0
    sum_y: Any = 0.0
    xx: Any = 0.0
    xy: Any = 0.0
    yy: Any = 0.0
    _shift_x: Any = 0.0
    _shift_y: Any = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in samples: shapes ``(n, d_x)`` and ``(n, d_y)``."""
        # Large offsets common to all samples (a few hidden units have them) would eat the digits of the centred products.
        if self.count == 0:
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
        x, y = x - self._shift_x, y - self._shift_y
        self.count += len(x)
        self.sum_x, self.sum_y = self.sum_x + x.sum(0), self.sum_y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + y.T @ y

    def cka(self) -> float:
        """Linear CKA of what was added, NaN when one of the two never varies."""
        n = self.count
        xx = self.xx - torch.outer(self.sum_x, self.sum_x) / n
        yy = self.yy - torch.outer(self.sum_y, self.sum_y) / n
        xy = self.xy - torch.outer(self.sum_x, self.sum_y) / n
        scale = float(torch.linalg.norm(xx) * torch.linalg.norm(yy))
        return float(torch.linalg.norm(xy) ** 2) / scale if scale > 0 else math.nan


@dataclass
class _Loaded:
    module: Any
    tokenizer: Any
    name: str


def layer_similarity(
    folders: Mapping[str, Path], texts: Sequence[str], *, device: str = "cpu", dtype: str = "float32"
) -> dict[tuple[int, int], LayerSimilarity]:
    """Compare models on texts.

    Args:
        folders: Name → directory of each model.
        texts: The probe.
        device: Where the models run.
        dtype: What they run in.

    Returns:
        Pair of models (indices) → CKA of their hidden states.

    Raises:
        ModelError: A model cannot be loaded by transformers, or has no tokenizer.
        UsageError: The device cannot be used.
    """
    loaded = [_load(name, folder, device, dtype) for name, folder in folders.items()]
    pairs = list(combinations(range(len(loaded)), 2))
    encoded = [[_encode(m, text) for text in texts] for m in loaded]
    # Samples of one batch must be of one unit: token by token only where every text has equally many in both.
    unit = {
        (i, j): "tokens" if all(len(x) == len(y) for x, y in zip(encoded[i], encoded[j], strict=True)) else "texts"
        for i, j in pairs
    }
    collected = _Collected(pairs, unit)
    for index in range(len(texts)):
        if min(len(e[index]) for e in encoded) == 0:
            continue
        collected.add([_states(m, e[index], device) for m, e in zip(loaded, encoded, strict=True)])
    return collected.finish()


@dataclass
class _Collected:
    """The moments of all pairs and layers."""

    pairs: Sequence[tuple[int, int]]
    unit: Mapping[tuple[int, int], str]
    layers: tuple[int, ...] = ()
    moments: dict[tuple[tuple[int, int], int], Moments] = field(default_factory=dict)

    def add(self, states: Sequence[list[Tensor]]) -> None:
        """One text's hidden states of each model, layer by layer: shapes ``(tokens, d)``."""
        if not self.layers:
            depth = min(len(s) for s in states)
            width = max(s[0].shape[1] for s in states)
            number = max(min(depth, BUDGET // (3 * 8 * width * width * len(self.pairs))), 2)
            self.layers = tuple(sorted({round(v) for v in np.linspace(0, depth - 1, number)}))
        for pair in self.pairs:
            for layer in self.layers:
                x, y = states[pair[0]][layer], states[pair[1]][layer]
                if self.unit[pair] == "texts":
                    x, y = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
                self.moments.setdefault((pair, layer), Moments()).add(x, y)

    def finish(self) -> dict[tuple[int, int], LayerSimilarity]:
        """The CKA of every pair; layers in which a model never varies are left out.

        Raises:
            UsageError: No layer varies.
        """
        found = {}
        for pair in self.pairs:
            values = [
                (layer, self.moments[pair, layer].cka()) for layer in self.layers if (pair, layer) in self.moments
            ]
            kept = [(layer, v) for layer, v in values if math.isfinite(v)]
            if not kept:
                raise UsageError(
                    "the hidden states are the same for all samples of the probe",
                    hint="give texts that differ, and more of them",
                )
            layers, numbers = zip(*kept, strict=True)
            count = self.moments[pair, self.layers[0]].count
            found[pair] = LayerSimilarity(layers, numbers, count, self.unit[pair])
        return found


def _encode(model: _Loaded, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False, truncation=True, max_length=LONGEST)["input_ids"])


@without_gradients()
def _states(model: _Loaded, ids: list[int], device: str) -> list[Tensor]:
    out = model.module(input_ids=torch.tensor([ids], device=device), output_hidden_states=True)
    states = out.hidden_states if getattr(out, "hidden_states", None) is not None else out.encoder_hidden_states
    return [s[0].double() for s in states]


def _load(name: str, folder: Path, device: str, dtype: str) -> _Loaded:
    import transformers

    with quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # noqa: BLE001 - the library raises whatever a damaged file leads to
            raise ModelError(
                f"its tokenizer cannot be loaded: {first_line(error)}",
                where=name,
                hint="CKA needs texts cut into tokens; leave out --cka and --probe to compare the weights only",
            ) from None
        try:
            module = transformers.AutoModel.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # noqa: BLE001 - see above
            raise ModelError(f"it cannot be loaded by transformers: {first_line(error)}", where=name) from None
    return _Loaded(placed(module, device), tokenizer, name)
