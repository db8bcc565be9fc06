"""What stands beside the weights of the output: its config and the files of the model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomerge.checkpoint.card import read_licence
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.config import edit_config
from geomerge.checkpoint.dtypes import recipe_name
from geomerge.checkpoint.side_files import KINDS
from geomerge.engine.models import Model
from geomerge.engine.vocabularies import Vocabularies
from geomerge.recipe.values import Recipe
from geomerge.tokens import chat, write

Description = tuple[dict[str, Any] | None, dict[str, Path], dict[str, str], list[str]]
"""The config, files to copy by name, files to write by name, notes."""


def describe_output(
    recipe: Recipe,
    donor: Model,
    members: list[Model],
    vocabularies: Vocabularies,
    *,
    dtype: str | None,
    block_maps: Mapping[str, list[int]],
    untied: bool,
) -> Description:
    """Everything of the output directory but the weights.

    The config, the tokenizer and the other files come from the donor (the base model, or else the first), edited for what the
    merge changed; the tokenizer comes from the recipe's tokenizer policy when there is one.

    Args:
        recipe: The recipe.
        donor: Whose config and files are taken.
        members: All models, for ``chat_template: auto``.
        vocabularies: What the tokenizer policy decided.
        dtype: The output's dtype by safetensors name, `None` when its tensors differ.
        block_maps: Module → source block of each output block, where the recipe has slices.
        untied: The output stores apart what some parents tie.
    """
    config = None
    if donor.config is not None:
        config = edit_config(
            donor.config,
            dtype=None if dtype is None else recipe_name(dtype),
            block_maps=block_maps,
            layer_keys=donor.anatomy.layer_keys,
            vocab_size=vocabularies.size if vocabularies.changes else None,
            tie=False if untied else None,
        )
    notes = list(vocabularies.notes)
    if untied:
        notes.append("some parents tie their head to the embedding and others do not: the output stores both")
    copies, texts = _side_files(donor.donor, without_tokenizer=vocabularies.plan is not None)
    folders = [m.donor.folder if m.donor else None for m in members]
    template = chat.resolve(
        recipe.chat_template, folders, where=str(recipe.at("chat_template")), folder=Path(recipe.where.file).parent
    )
    if vocabularies.plan is not None:
        found: dict[str, Path | str] = dict(write.files(vocabularies.plan.tokenizer, template))
    elif template is not None and donor.donor is not None and donor.donor.folder is not None:
        found = dict(copies)
        write.replace_chat_template(found, template, donor.donor.folder)
        copies = {}
    else:
        found = {}
    copies |= {name: content for name, content in found.items() if isinstance(content, Path)}
    texts |= {name: content for name, content in found.items() if isinstance(content, str)}
    return config, copies, texts, notes


def _side_files(donor: Checkpoint | None, *, without_tokenizer: bool) -> tuple[dict[str, Path], dict[str, str]]:
    if donor is None or donor.folder is None:
        return {}, {}
    copies: dict[str, Path] = {}
    for kind in KINDS:
        if without_tokenizer and kind in ("tokenizer", "chat_template"):
            continue
        copies |= {p.relative_to(donor.folder).as_posix(): p for p in donor.side_files(kind)}
    return copies, {}


def licence_of(checkpoint: Checkpoint) -> str | None:
    """The licence that a model's card states."""
    return read_licence(checkpoint.folder)
