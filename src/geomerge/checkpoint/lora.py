"""LoRA adapters on disk: PEFT directories and kohya's single files, read and checked without their base.

    ΔW = s·B·A        s = α/r, or α/√r for rank-stabilised LoRA; B (out, r), A (r, in)

An adapter is read as values: which module has which factors and scale, which tensors come whole. What fits where is decided
when it meets its base (`geomerge.engine.adapted`). Whatever would need a rule that is not known here is refused.

References: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.folder import check_contained
from geomerge.checkpoint.header import TensorInfo, read_header
from geomerge.checkpoint.hub import Located, locate
from geomerge.checkpoint.output_place import ADAPTER, MARKS
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import DamagedCheckpoint, ModelError

CONFIG_NAME = MARKS[ADAPTER]
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""

KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_")

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<linear>[AB])(?:\.default)?\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_KOHYA = re.compile(r"(?P<module>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_FOREIGN: Mapping[str, str] = {
    r"\bhada_": "LoHa",
    r"\blokr_": "LoKr",
    r"\boft_|oft_blocks": "OFT",
    r"\bia3_": "IA³",
    r"\bvera_": "VeRA",
    r"\blora_E\b|ranknum": "AdaLoRA",
    r"\blora_mid\b": "LoRA with a Tucker core (lora_mid)",
    r"\bdora_scale\b": "DoRA in kohya's layout",
    r"trainable_tokens": "single trainable tokens",
    r"prompt_embeddings": "prompt tuning",
}
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_REFUSED: Mapping[str, str] = {
    "target_parameters": "adapts parameters that belong to no linear layer (target_parameters)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "is active only after certain tokens (activated LoRA), which no fixed weight can express",
    "trainable_token_indices": "trains single rows of the embedding (trainable_token_indices)",
    "use_qalora": "pools its inputs (QA-LoRA)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "kasa_config": "takes singular values away from its base (KaSA)",
    "arrow_config": "is a router between adapters (Arrow)",
    "monteclora_config": "samples its factors (MonteCLoRA)",
    "enable_lora": "adapts parts of a fused layer (enable_lora)",
}


@dataclass(frozen=True)
class LowRank:
    """One module's update, ΔW = scale·B·A.

    Attributes:
        module: The module's path as the adapter writes it.
        a, b: The names of the factors A (r, in, …) and B (out, r, …).
        rank: r.
        scale: s.
        embedding: The module is an embedding, whose weight has a row for each input.
        magnitude: The name of DoRA's magnitudes, or empty.
        bias: The name of B's bias, which adds s·bias to the module's, or empty.
    """

    module: str
    a: str
    b: str
    rank: int
    scale: float
    embedding: bool = False
    magnitude: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter that is open for reading.

    Attributes:
        ref: As the user wrote it.
        weights: Its weight file.
        folder: Its directory; `None` for a single file.
        layout: Whose.
        modules: Module path → low-rank update.
        whole: Tensor path → name in the file: tensors that replace the base's.
        config: ``adapter_config.json``; empty for a single file.
        base, base_revision: What it says its base is.
    """

    ref: str
    weights: Checkpoint
    folder: Path | None
    layout: Literal["peft", "kohya"]
    modules: Mapping[str, LowRank]
    whole: Mapping[str, str]
    config: Mapping[str, Any]
    base: str | None = None
    base_revision: str | None = None

    @property
    def fan_in_fan_out(self) -> bool:
        """The config says that weights are stored as (in, out)."""
        return self.config.get("fan_in_fan_out") is True


def is_adapter(path: Path) -> bool:
    """Whether a local directory holds an adapter."""
    return (path / CONFIG_NAME).is_file()


def open_adapter(
    ref: str, revision: str | None = None, *, subfolder: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Open an adapter: a PEFT directory, kohya's single file, or a hub id.

    Args:
        ref, revision, subfolder: What the user wrote.
        allow_pickle: Read ``adapter_model.bin``, weights only, where there is no safetensors file.

    Raises:
        ModelError: It is none, or of a kind that is not LoRA, or damaged; tensor and reason are named.
    """
    located = locate(ref, revision, subfolder=subfolder, allow_pickle=allow_pickle)
    path = located.path
    if path.is_dir():
        if not is_adapter(path):
            raise ModelError(f"has no {CONFIG_NAME}: it is not a LoRA adapter", where=ref)
        file, pickle = path / WEIGHTS_NAME, path / "adapter_model.bin"
        if not file.is_file() and not pickle.is_file():
            raise ModelError(f"has no {WEIGHTS_NAME}", where=ref)
        check_contained(path / CONFIG_NAME, path)
        config = read_json(path / CONFIG_NAME, what=CONFIG_NAME, constants=True)
        if file.is_file():
            check_contained(file, path)
            weights = _weights(ref, located, file)
        else:
            check_contained(pickle, path)
            weights = open_checkpoint(str(pickle), allow_pickle=allow_pickle)
            _check_tensors(ref, weights.tensors.values())
        return _peft(ref, weights, path, config)
    if path.suffix != ".safetensors":
        raise ModelError("is neither an adapter's directory nor a .safetensors file", where=ref)
    return _kohya(ref, _weights(ref, located, path))


def _weights(ref: str, located: Located, file: Path) -> Checkpoint:
    info, tensors, metadata = read_header(file)
    _check_tensors(ref, tensors)
    if not tensors:
        raise DamagedCheckpoint("holds no tensors", where=ref)
    return Checkpoint(
        ref,
        replace(located, path=file),
        folder=None,
        config=None,
        tensors={t.name: t for t in tensors},
        files=(info,),
        metadata=metadata,
    )


def _check_tensors(ref: str, tensors: Iterable[TensorInfo]) -> None:
    for tensor in tensors:
        _check_foreign(tensor.name, ref)
        if DTYPES[tensor.dtype].kind != "float" and not tensor.name.endswith(".alpha"):
            raise ModelError(f"the tensor {tensor.name} is {DTYPES[tensor.dtype].recipe}, not of floats", where=ref)


def _check_foreign(name: str, ref: str) -> None:
    for pattern, kind in _FOREIGN.items():
        if re.search(pattern, name):
            raise ModelError(
                f"is {kind} ({name}), not plain LoRA", where=ref, hint="merge it into its base with its own library"
            )


# -- PEFT --------------------------------------------------------------------------------------------------------------


def _peft(ref: str, weights: Checkpoint, folder: Path, config: Mapping[str, Any]) -> Adapter:
    _check_config(config, ref)
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in weights.tensors:
        path = name.removeprefix(PREFIX)
        found = _FACTOR.fullmatch(path)
        if found is None:
            if "lora_" in path:
                raise ModelError(f"the tensor {name} is of no known layout", where=ref)
            plain = path.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            if plain.startswith("base_model.") or ".original_module." in plain:
                raise ModelError(f"the tensor {name} is of no known layout", where=ref)
            whole[plain] = name
            continue
        module = parts.setdefault(found["module"], {})
        side = found["linear"] or found["embedding"]
        if found["magnitude"]:
            key = "magnitude"
        elif found["kind"] == "bias":
            key = f"bias{side}"
        else:
            key = f"{side}e" if found["embedding"] else str(side)
        if key in module:
            raise DamagedCheckpoint(f"{found['module']} has the part {key} twice", where=ref)
        module[key] = name
    modules = {path: _low_rank(ref, weights, path, found, config) for path, found in parts.items()}
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    return Adapter(
        ref,
        weights,
        folder,
        "peft",
        modules,
        whole,
        config,
        base if isinstance(base, str) and base else None,
        revision if isinstance(revision, str) and revision else None,
    )


def _check_config(config: Mapping[str, Any], ref: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"is of the type {kind!r}, not LORA", where=ref, hint="merge it into its base with PEFT: merge_and_unload"
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ModelError(f"{why}: that is not a low-rank change of a weight", where=ref)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise ModelError(
            f"was started by {start}, which also changes the base: its factors belong to that changed base",
            where=ref,
            hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA",
        )


def _low_rank(
    ref: str, weights: Checkpoint, module: str, parts: Mapping[str, str], config: Mapping[str, Any]
) -> LowRank:
    embedding = "Ae" in parts or "Be" in parts
    a, b = ("Ae", "Be") if embedding else ("A", "B")
    if a not in parts or b not in parts or "biasA" in parts or (embedding and ("A" in parts or "B" in parts)):
        raise DamagedCheckpoint(f"{module} has the parts {', '.join(sorted(parts))}: not both factors", where=ref)
    rank = _rank(ref, module, weights.tensors[parts[a]], weights.tensors[parts[b]])
    said = _patterned(config, "rank_pattern", module, config.get("r"), ref)
    if said != rank:
        raise DamagedCheckpoint(f"the factors of {module} have the rank {rank}, its config says {said}", where=ref)
    alpha = _patterned(config, "alpha_pattern", module, config.get("lora_alpha"), ref)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise DamagedCheckpoint(f"lora_alpha of {module} is {alpha!r}, not a number", where=ref)
    if bool(config.get("use_dora")) != ("magnitude" in parts):
        has = "has" if "magnitude" in parts else "lacks"
        said_so = "says" if config.get("use_dora") else "does not say"
        raise DamagedCheckpoint(f"{module} {has} DoRA's magnitudes, and the config {said_so} use_dora", where=ref)
    return LowRank(
        module,
        parts[a],
        parts[b],
        rank,
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        embedding,
        parts.get("magnitude", ""),
        parts.get("biasB", ""),
    )


def _rank(ref: str, module: str, a: TensorInfo, b: TensorInfo) -> int:
    rank = a.shape[0] if len(a.shape) > 1 else 0
    if not rank or len(b.shape) != len(a.shape) or 0 in (*a.shape, *b.shape):
        raise DamagedCheckpoint(
            f"the factors of {module} have the shapes {list(a.shape)} and {list(b.shape)}",
            where=ref,
            hint="were they saved without being gathered from all devices?",
        )
    if b.shape[1] != rank or any(n != 1 for n in b.shape[2:]):
        raise ModelError(
            f"the factors of {module}, {list(a.shape)} and {list(b.shape)}, do not multiply: a grouped convolution?",
            where=ref,
            hint="grouped convolutions are not merged",
        )
    return rank


def _patterned(config: Mapping[str, Any], key: str, module: str, default: Any, ref: str) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a module: the first key that is the end of its path."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise DamagedCheckpoint(f"{key} is {patterns!r:.80}, not an object", where=ref)
    for pattern, value in patterns.items():
        # Repeated groups can take exponential time and many repetitions nearly so; no adapter needs them.
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3 or len(pattern) > 500:
            raise ModelError(f"the pattern {pattern!r:.80} in {key} is too complicated", where=ref)
        try:
            if re.match(rf"(?:.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise DamagedCheckpoint(
                f"the pattern {pattern!r:.80} in {key} is no regular expression", where=ref
            ) from None
    return default


# -- kohya -------------------------------------------------------------------------------------------------------------


def _kohya(ref: str, weights: Checkpoint) -> Adapter:
    parts: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        found = _KOHYA.fullmatch(name)
        if found is None or not found["module"].startswith(KOHYA_PREFIXES):
            raise ModelError(
                f"is no LoRA file in kohya's layout: it has the tensor {name}",
                where=ref,
                hint=f"give an adapter's directory with {CONFIG_NAME}, or a file with lora_unet_… and lora_te_… tensors",
            )
        parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = name
    modules = {}
    for module, found_parts in parts.items():
        if not {"lora_down", "lora_up"} <= found_parts.keys():
            raise DamagedCheckpoint(f"{module} has {', '.join(sorted(found_parts))}: not both factors", where=ref)
        a, b = found_parts["lora_down"], found_parts["lora_up"]
        rank = _rank(ref, module, weights.tensors[a], weights.tensors[b])
        alpha = _alpha(ref, weights, found_parts["alpha"]) if "alpha" in found_parts else float(rank)
        modules[module] = LowRank(module, a, b, rank, alpha / rank)
    return Adapter(ref, weights, None, "kohya", modules, {}, {})


def _alpha(ref: str, weights: Checkpoint, name: str) -> float:
    import torch

    from geomerge.checkpoint.dtypes import to_torch

    info = weights.tensors[name]
    if math.prod(info.shape) != 1:
        raise DamagedCheckpoint(f"{name} has the shape {list(info.shape)}, not one number", where=ref)
    value = float(torch.frombuffer(bytearray(weights.read_bytes(info)), dtype=to_torch(info.dtype)).item())
    if not math.isfinite(value):
        raise DamagedCheckpoint(f"{name} is {value}", where=ref)
    return value
