"""Recipes: what the user asked for, read from YAML into frozen values, and evaluated for single tensors."""

from geomerge.recipe.parse import load, loads
from geomerge.recipe.references import parse_reference
from geomerge.recipe.resolve import Lookup, Resolved, check_filters, layer_t, resolve_parameter, scopes, unused_entries
from geomerge.recipe.schema import json_schema
from geomerge.recipe.values import (
    Entry,
    Filter,
    ModelRef,
    Module,
    Pipeline,
    Recipe,
    Setting,
    Slice,
    Source,
    Step,
    TokenizerSpec,
    TokenRule,
    Where,
)

__all__ = [
    "Entry",
    "Filter",
    "Lookup",
    "ModelRef",
    "Module",
    "Pipeline",
    "Recipe",
    "Resolved",
    "Setting",
    "Slice",
    "Source",
    "Step",
    "TokenRule",
    "TokenizerSpec",
    "Where",
    "check_filters",
    "json_schema",
    "layer_t",
    "load",
    "loads",
    "parse_reference",
    "resolve_parameter",
    "scopes",
    "unused_entries",
]
