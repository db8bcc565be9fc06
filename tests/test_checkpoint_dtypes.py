"""Element types: names, widths, and what a person may write."""

from __future__ import annotations

import pytest
import torch

from geomerge.checkpoint.dtypes import DTYPES, from_torch, parse_dtype, recipe_name, to_torch
from geomerge.errors import ModelError, RecipeError


@pytest.mark.parametrize("name", list(DTYPES))
def test_table_agrees_with_torch(name: str) -> None:
    """Every entry's torch dtype exists, has the stated width, and maps back to the entry."""
    dtype = to_torch(name)
    assert torch.empty(0, dtype=dtype).element_size() == DTYPES[name].itemsize
    assert from_torch(dtype) == name
    assert recipe_name(name) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("bfloat16", "BF16"),
        ("torch.bfloat16", "BF16"),
        ("bf16", "BF16"),
        ("BF16", "BF16"),
        (" float32 ", "F32"),
        ("fp32", "F32"),
        ("half", "F16"),
        ("float16", "F16"),
        ("float64", "F64"),
    ],
)
def test_parse_dtype_accepts_the_usual_spellings(text: str, name: str) -> None:
    """Recipe, torch, short and safetensors names mean the same."""
    assert parse_dtype(text) == name


def test_unknown_dtype_says_where_and_what_was_meant() -> None:
    """A misspelt dtype is a recipe error with the line and a suggestion."""
    with pytest.raises(RecipeError) as caught:
        parse_dtype("bfloat61", "recipe.yml:3")
    assert str(caught.value).startswith("recipe.yml:3: unknown dtype 'bfloat61'")
    assert "did you mean 'bfloat16'" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["int8", "float8_e4m3fn", "torch.bool"])
def test_dtypes_without_room_for_a_mean_are_refused(text: str) -> None:
    """Integers, booleans and float8 are known but no output dtypes."""
    with pytest.raises(RecipeError, match="cannot be written as"):
        parse_dtype(text)


@pytest.mark.parametrize("value", [None, 16, True, [], ""])
def test_values_that_are_no_words_are_refused(value: object) -> None:
    """YAML may hold anything."""
    with pytest.raises(RecipeError, match="unknown dtype"):
        parse_dtype(value)


def test_a_torch_dtype_that_no_file_can_hold() -> None:
    """complex128 has no name in the format."""
    with pytest.raises(ModelError, match="complex128"):
        from_torch(torch.complex128)
