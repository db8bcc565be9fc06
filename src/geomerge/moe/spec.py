"""What a mixture of experts is made of, read from YAML: mergekit-moe's keys and a few more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from geomerge.checkpoint.dtypes import parse_dtype
from geomerge.errors import RecipeError, did_you_mean
from geomerge.moe.families import FAMILIES
from geomerge.moe.router import Mode
from geomerge.recipe.document import Items, Node, Table, Text, read_documents, read_text, said_kind
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE, ModelRef, Where

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Expert:
    """One expert.

    Attributes:
        model: The dense model whose feed-forward layers it gets.
        positive, negative: Prompts that it shall and shall not answer.
        scale: Factor of what it adds to the residual stream (of its ``down_proj``).
        where: Where the configuration says so.
    """

    model: ModelRef
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    scale: float | None = None
    where: Where = NOWHERE


@dataclass(frozen=True)
class MoeSpec:
    """A whole configuration.

    Attributes:
        base: Gives everything but the feed-forward layers.
        experts: The routed experts, in the order of their numbers.
        shared: The experts that every token goes through.
        mode: How the gates are made: see `geomerge.moe.router`.
        per_token: How many experts each token goes through.
        dtype: Of the output, by safetensors name; `None` takes the base's, tensor by tensor.
        architecture: The output's, by name; `None` takes the first that can hold it.
        seed: Of random gates.
        text: The configuration as it was written.
        where: Its first line.
    """

    base: ModelRef
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    mode: Mode = "hidden"
    per_token: int = 2
    dtype: str | None = None
    architecture: str | None = None
    seed: int = 0
    text: str = ""
    where: Where = NOWHERE


def read_spec(source: str | Path) -> MoeSpec:
    """Read a configuration from a file, or from YAML text (recognised by a line break).

    Raises:
        RecipeError: With the file and line.
    """
    if isinstance(source, str) and "\n" in source:
        text, file = source, "<moe>"
    else:
        text, file = read_text(Path(source), str(source)), str(source)
    documents = read_documents(text, file)
    if len(documents) != 1:
        raise RecipeError(f"a mixture of experts is one document, not {len(documents)}", where=file)
    return _read(documents[0], text)


def _read(table: Table, text: str) -> MoeSpec:
    entries = _known(
        table,
        "the configuration",
        {
            *("base_model", "experts", "shared_experts", "gate_mode", "experts_per_token"),
            *("dtype", "architecture", "seed", "noise_scale"),
        },
        required=("base_model", "experts"),
    )
    _no_noise(entries)
    mode = _choice(entries, "gate_mode", MODES, "hidden")
    experts = _experts(entries, "experts")
    shared = _experts(entries, "shared_experts")
    spec = MoeSpec(
        base=_model(*entries["base_model"]),
        experts=experts,
        shared=shared,
        mode=mode,
        per_token=_whole(entries, "experts_per_token", min(2, len(experts)), least=1),
        dtype=parse_dtype(_word(*entries["dtype"]), entries["dtype"][0]) if _said(entries, "dtype") else None,
        architecture=_choice(entries, "architecture", (*FAMILIES, None), None),
        seed=_whole(entries, "seed", 0, least=0),
        text=text,
        where=table.where,
    )
    _check(spec, entries)
    return spec


def _check(spec: MoeSpec, entries: Mapping[str, tuple[Where, Node]]) -> None:
    if spec.per_token > len(spec.experts):
        at = entries.get("experts_per_token", entries["experts"])[0]
        raise RecipeError(
            f"experts_per_token is {spec.per_token}, but there are {len(spec.experts)} experts", where=str(at)
        )
    if spec.mode in ("random", "uniform_random"):
        return
    for expert in spec.experts:
        if not expert.positive:
            raise RecipeError(
                f"the expert {expert.model} has no positive_prompts, from which gate_mode {spec.mode!r} makes its gate",
                where=str(expert.where),
                hint="add some, or use `gate_mode: random`",
            )


def _experts(entries: Mapping[str, tuple[Where, Node]], key: str) -> tuple[Expert, ...]:
    if not _said(entries, key):
        return ()
    where, node = entries[key]
    if not isinstance(node, Items) or not node.items:
        raise RecipeError(f"{key!r} must be a list of experts, not {said_kind(node)}", where=str(where))
    return tuple(_expert(item) for item in node.items)


def _expert(node: Node) -> Expert:
    if not isinstance(node, Table):
        raise RecipeError(
            f"an expert must be a mapping with 'source_model', not {said_kind(node)}", where=str(node.where)
        )
    entries = _known(
        node,
        "an expert",
        {"source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale"},
        required=("source_model",),
    )
    _no_noise(entries)
    return Expert(
        model=_model(*entries["source_model"]),
        positive=_prompts(entries, "positive_prompts"),
        negative=_prompts(entries, "negative_prompts"),
        scale=_number(*entries["residual_scale"]) if _said(entries, "residual_scale") else None,
        where=node.where,
    )


def _no_noise(entries: Mapping[str, tuple[Where, Node]]) -> None:
    if _said(entries, "noise_scale") and _number(*entries["noise_scale"]) != 0:
        raise RecipeError(
            "noise_scale is not supported: an expert's weights are copied",
            where=str(entries["noise_scale"][0]),
            hint="leave it out; `residual_scale` is supported",
        )


def _known(table: Table, what: str, keys: set[str], *, required: tuple[str, ...]) -> Mapping[str, tuple[Where, Node]]:
    for key, (where, _) in table.entries.items():
        if key not in keys:
            raise RecipeError(f"{what} has no key {key!r}", where=str(where), hint=did_you_mean(key, keys))
    for key in required:
        if not _said(table.entries, key):
            raise RecipeError(f"{what} needs {key!r}", where=str(table.where))
    return table.entries


def _said(entries: Mapping[str, tuple[Where, Node]], key: str) -> bool:
    """Whether a key is there and is not null."""
    node = entries[key][1] if key in entries else None
    return node is not None and not (isinstance(node, Text) and node.empty)


def _word(where: Where, node: Node) -> str:
    if not isinstance(node, Text):
        raise RecipeError(f"a word is expected, not {said_kind(node)}", where=str(where))
    return node.text


def _model(where: Where, node: Node) -> ModelRef:
    return parse_reference(_word(where, node), where)


def _number(where: Where, node: Node) -> float:
    value = node.value() if isinstance(node, Text) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"a number is expected, not {said_kind(node)}", where=str(where))
    return float(value)


def _whole(entries: Mapping[str, tuple[Where, Node]], key: str, default: int, *, least: int) -> int:
    if not _said(entries, key):
        return default
    where, node = entries[key]
    number = _number(where, node)
    if number != int(number) or number < least:
        raise RecipeError(f"{key} must be a whole number from {least} on, not {said_kind(node)}", where=str(where))
    return int(number)


def _choice(entries: Mapping[str, tuple[Where, Node]], key: str, choices: tuple[Any, ...], default: Any) -> Any:
    if not _said(entries, key):
        return default
    word = _word(*entries[key])
    if word not in choices:
        words = [c for c in choices if c is not None]
        raise RecipeError(f"unknown {key} {word!r}", where=str(entries[key][0]), hint=did_you_mean(word, words))
    return word


def _prompts(entries: Mapping[str, tuple[Where, Node]], key: str) -> tuple[str, ...]:
    if not _said(entries, key):
        return ()
    where, node = entries[key]
    items = node.items if isinstance(node, Items) else (node,)
    found = tuple(_word(where, item) for item in items)
    if any(not text.strip() for text in found):
        raise RecipeError(f"{key} holds an empty prompt", where=str(where))
    return found
