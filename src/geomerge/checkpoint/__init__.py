"""Weights on disk: reading models, writing one in place, and the files that surround the weights."""

from geomerge.checkpoint.card import Parent, combine_licences, model_card, read_licence
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.config import edit_config
from geomerge.checkpoint.dtypes import DTYPES, from_torch, parse_dtype, recipe_name, to_torch
from geomerge.checkpoint.header import FileInfo, TensorInfo
from geomerge.checkpoint.layout import Layout, parse_size, plan_layout
from geomerge.checkpoint.reader import from_state_dict, open_checkpoint
from geomerge.checkpoint.writer import JOURNAL, OutputDirectory, disk_error

__all__ = [
    "DTYPES",
    "JOURNAL",
    "Checkpoint",
    "FileInfo",
    "Layout",
    "OutputDirectory",
    "Parent",
    "TensorInfo",
    "combine_licences",
    "disk_error",
    "edit_config",
    "from_state_dict",
    "from_torch",
    "model_card",
    "open_checkpoint",
    "parse_dtype",
    "parse_size",
    "plan_layout",
    "read_licence",
    "recipe_name",
    "to_torch",
]
