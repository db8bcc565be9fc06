"""Which tensors of the output are written as 8-bit codes, and what its config says of them: the recipe's ``requantize``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from geomerge.anatomy import Part
from geomerge.checkpoint.coded.scaled import Scaled
from geomerge.checkpoint.config import library_of
from geomerge.engine.models import Model
from geomerge.engine.plan import SCALES, Node
from geomerge.errors import RecipeError
from geomerge.recipe.values import Recipe

_CODES = {"int8": "I8", "fp8": "F8_E4M3"}
_LINEAR = frozenset({"attention", "mlp", "expert", "ssm"})
"""Roles of the matrices that are written as codes; norms, embeddings, heads and routers keep their numbers."""


class Encoding:
    """The scheme of one recipe's output.

    Args:
        recipe: The recipe.
        donor: Whose config the output has.

    Raises:
        RecipeError: ``requantize: same`` of a model that is not stored in a scheme that can be written.
    """

    def __init__(self, recipe: Recipe, donor: Model) -> None:
        self._asked, self._donor = recipe.requantize, donor
        if self._asked == "same" and not _encodable(donor):
            raise RecipeError(
                f"`requantize: same` needs a base (or first) model that is stored as 8-bit codes with a scale for each row or "
                f"for all; {donor} is not",
                where=str(recipe.at("requantize")),
                hint="`requantize: int8` or `fp8` writes codes whatever the models are stored as",
            )
        if self._asked in _CODES and library_of(donor.config) != "transformers":
            raise RecipeError(
                f"`requantize: {self._asked}` is told to the model's config.json, and {donor} has none of transformers'",
                where=str(recipe.at("requantize")),
            )

    def nodes(self, node: Node, part: Part) -> tuple[Node, ...]:
        """The node; or, where it is to be encoded, one for the codes and one for their scales."""
        if node.method is None or self._asked is None:
            return (node,)
        if self._asked == "same":
            checkpoint = self._donor.checkpoint
            assert checkpoint is not None
            scaled = checkpoint.coded.get(node.name)
            if not isinstance(scaled, Scaled):
                return (node,)
            scale = checkpoint.tensors[scaled.scale]
            codes, name, shape, dtype = checkpoint.tensors[node.name].dtype, scale.name, scale.shape, scale.dtype
        else:
            # compressed-tensors means the matrices of linear layers, which have a role in a block.
            linear = part.block is not None and part.role in _LINEAR and len(node.shape) == 2
            if not (linear and node.name.endswith(".weight") and node.rule == "merge"):
                return (node,)
            codes, name, shape, dtype = _CODES[self._asked], f"{node.name}_scale", (node.shape[0], 1), "F32"
        return (
            replace(node, dtype=codes, scales=name),
            Node(name, shape, dtype, (), None, rule=SCALES, stage=node.stage),
        )

    def statement(self, nodes: Iterable[Node]) -> dict[str, Any]:
        """The config's ``quantization_config``."""
        if self._asked == "same":
            assert self._donor.checkpoint is not None
            found = (self._donor.checkpoint.config or {}).get("quantization_config", {})
            return dict(found)
        plain = {n.name.removesuffix(".weight") for n in nodes if not n.scales and n.name.endswith(".weight")}
        plain -= {n.name.removesuffix(".weight") for n in nodes if len(n.shape) != 2}
        plain |= {alias.removesuffix(".weight") for alias in self._donor.anatomy.tied}
        return _statement("int" if self._asked == "int8" else "float", sorted(plain))


def _statement(kind: str, ignore: list[str]) -> dict[str, Any]:
    """compressed-tensors' scheme of one scale for each row, and activations that are quantised token by token as they come:
    its presets ``W8A8`` (``INT8``) and ``FP8_DYNAMIC``."""
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def _encodable(model: Model) -> bool:
    """Whether all codes of a model are of a kind that a merge can be written back in."""
    coded = [] if model.checkpoint is None else list(model.checkpoint.coded.values())
    return bool(coded) and all(isinstance(each, Scaled) and each.encodable for each in coded)
