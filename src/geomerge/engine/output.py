"""What stands beside the weights of the output: its config and the files of the model directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geomerge.anatomy.anatomy import lookup
from geomerge.checkpoint.card import read_licence
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.config import edit_config
from geomerge.checkpoint.dtypes import recipe_name
from geomerge.checkpoint.side_files import KINDS, side_files
from geomerge.checkpoint.strict_json import read_json
from geomerge.engine.config_differences import config_differences
from geomerge.engine.models import Model
from geomerge.engine.special_ids import follow
from geomerge.engine.vocabularies import Vocabularies
from geomerge.recipe.values import Recipe
from geomerge.tokens import chat, write

_GENERATION = "generation_config.json"

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
    aligned: bool = False,
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
        aligned: It does so because they were aligned, which has a note of its own.
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
    notes = [*vocabularies.notes, *_contradictions(donor, members)]
    if config is not None and not block_maps:
        notes += _not_stored(donor, config, vocabulary=not vocabularies.changes)
    if config is None and any(member.config is not None for member in members):
        notes.append(f"{donor} has no config.json, and neither has the output: put one beside its weights to load it")
    if untied and not aligned:
        notes.append("some parents tie their head to the embedding and others do not: the output stores both")
    copies, texts = donor_files(donor, without_tokenizer=vocabularies.plan is not None), dict[str, str]()
    template = chat.resolve(
        recipe.chat_template,
        [m.tokenizer_folder for m in members],
        where=str(recipe.at("chat_template")),
        folder=Path(recipe.where.file).parent,
    )
    if vocabularies.plan is not None:
        config = _follow(vocabularies.plan.tokenizer, donor, vocabularies.inputs, config, copies, texts, notes)
        found: dict[str, Path | str] = dict(write.files(vocabularies.plan.tokenizer, template))
    elif template is not None and donor.tokenizer_folder is not None:
        found = dict(copies)
        write.replace_chat_template(found, template, donor.tokenizer_folder)
        copies = {}
    else:
        found = {}
    copies |= {name: content for name, content in found.items() if isinstance(content, Path)}
    texts |= {name: content for name, content in found.items() if isinstance(content, str)}
    return config, copies, texts, notes


def _contradictions(donor: Model, members: list[Model]) -> Iterator[str]:
    """What the others' configurations say of the network that the output's, which is the donor's, contradicts."""
    for other in members:
        if other is donor or other.config is None or donor.config is None or other.config == donor.config:
            continue
        for found in config_differences(donor, other, (str(donor), str(other))):
            if found.severity != "note":
                yield f"{found.what}: {found.advice}"


def _not_stored(donor: Model, config: Mapping[str, Any], *, vocabulary: bool) -> Iterator[str]:
    """Blocks and tokens that the output's configuration states and no tensor holds."""
    for module, keys in donor.anatomy.layer_keys.items():
        stored = donor.anatomy.depth[module]
        for key in keys:
            stated = lookup(config, key)
            if isinstance(stated, int) and stated > stored and "num_hidden_groups" not in config:
                yield f"the config of {donor} says {key} = {stated}, but {stored} are stored: what loads it makes the others up"
    rows = {donor.tensors[name].shape[axis] for name, axis in donor.anatomy.vocabulary.items() if name in donor.tensors}
    stated = config.get("vocab_size")
    if vocabulary and len(rows) == 1 and isinstance(stated, int) and stated > max(rows):
        yield f"the config of {donor} says vocab_size = {stated}, but the embedding has {max(rows)} rows: it will not load"


def donor_files(donor: Model, *, without_tokenizer: bool) -> dict[str, Path]:
    """The files beside a model's weights and config: name → path."""
    if donor.folder is None:
        return {}
    copies: dict[str, Path] = {}
    for kind in KINDS:
        if without_tokenizer and kind in ("tokenizer", "chat_template"):
            continue
        folder = donor.tokenizer_folder if kind in ("tokenizer", "chat_template") else donor.folder
        if folder is not None:
            copies |= {p.relative_to(folder).as_posix(): p for p in side_files(folder, donor.config, kind)}
    return copies


def _follow(
    tokenizer: write.OutputTokenizer,
    donor: Model,
    members: list[Model],
    config: dict[str, Any] | None,
    copies: dict[str, Path],
    texts: dict[str, str],
    notes: list[str],
) -> dict[str, Any] | None:
    """Let the token ids in the donor's configs follow the output's vocabulary; returns the new config."""
    own = donor.vocabulary
    if own is None or not own.ids or not tokenizer.source.ids:
        return config
    new = tokenizer.ids()
    old = {index: token for token, index in own.ids.items() if new.get(token) != index}
    if not old:
        return config
    owner = next((m for m in members if m.vocabulary is tokenizer.source), donor)
    if config is not None:
        config, lost = follow(config, old, new, owner.config or {})
        notes += lost
    generation = copies.get(_GENERATION)
    if generation is not None:
        beside = owner.folder / _GENERATION if owner.folder else None
        theirs = read_json(beside, what=_GENERATION, constants=True) if beside and beside.is_file() else {}
        changed, lost = follow(read_json(generation, what=_GENERATION, constants=True), old, new, theirs)
        notes += lost
        del copies[_GENERATION]
        texts[_GENERATION] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    return config


def licence_of(checkpoint: Checkpoint) -> str | None:
    """The licence that a model's card states."""
    return read_licence(checkpoint.folder)
