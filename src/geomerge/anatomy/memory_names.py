"""The names that a transformers module gives its weights in memory, and those on disk: version 5 renames some architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def in_memory(module: nn.Module) -> Callable[[str], str]:
    """From a tensor's name on disk to its name in memory."""
    table = _table(module, legacy=True)
    if not table:
        return lambda name: name
    from transformers.core_model_loading import rename_source_key

    return lambda name: str(rename_source_key(name, table, [])[0])


def on_disk(module: nn.Module) -> Callable[[str], str]:
    """From a tensor's name in memory to that under which transformers saves it."""
    table = [renaming.reverse_transform() for renaming in reversed(_table(module, legacy=False))]

    def renamed(name: str) -> str:
        for each in table:
            name = str(each.rename_source_key(name)[0])
        return name

    return renamed


def _table(module: nn.Module, *, legacy: bool) -> list[Any]:
    """The renamings from disk to memory; none of other modules, and of earlier versions, which have no such table."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    if not isinstance(module, PreTrainedModel):
        return []
    return [
        each for each in get_model_conversion_mapping(module, add_legacy=legacy) if isinstance(each, WeightRenaming)
    ]
