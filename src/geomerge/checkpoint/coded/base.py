"""What every format of codes has in common.

A format is a frozen value, made from a header alone, that can decode any piece of its tensor. Each element is decoded from its
own code and scale and from nothing else, so the numbers do not depend on how a tensor is cut; and they are *exact*: what the
codes stand for, not what a library's 16-bit arithmetic makes of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from geomerge.checkpoint.dtypes import DTYPES, parse_dtype
from geomerge.errors import DamagedCheckpoint, RecipeError

if TYPE_CHECKING:
    from torch import Tensor


class Parts(Protocol):
    """The stored tensors of a checkpoint, as they are needed to decode one of its tensors."""

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Some elements of a stored tensor in row-major order: one-dimensional, in its own dtype, read now."""

    def whole(self, name: str) -> Tensor:
        """A stored tensor in its own shape and dtype, read once and kept: for scales, and for codes laid out by columns."""


@dataclass(frozen=True)
class Coded(ABC):
    """A tensor that is stored as codes.

    Attributes:
        name: Its name as a tensor of the decoded model.
        dtype: What it is said to be there (a safetensors name): the dtype that a merge is written in unless asked otherwise.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def stored(self) -> tuple[str, ...]:
        """The stored tensors that it is decoded from."""

    @property
    def exact(self) -> str:
        """A dtype that holds the decoded elements exactly."""
        return "F64"

    @abstractmethod
    def decode(self, parts: Parts, start: int, stop: int) -> Tensor:
        """The elements ``[start, stop)`` in row-major order: one-dimensional, of the dtype `exact`."""


@dataclass(frozen=True)
class RowCoded(Coded):
    """A tensor whose rows can be decoded one by one."""

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return max(prod(self.shape[1:]), 1) if len(self.shape) > 1 else max(prod(self.shape), 1)

    def decode(self, parts: Parts, start: int, stop: int) -> Tensor:
        columns = self.columns
        first, last = start // columns, -(-stop // columns)
        return self.rows(parts, first, last).reshape(-1)[start - first * columns : stop - first * columns]

    @abstractmethod
    def rows(self, parts: Parts, first: int, last: int) -> Tensor:
        """The rows ``[first, last)``, shape ``(last − first, columns)``, of the dtype `exact`."""


class CannotDecode(Exception):
    """A model holds codes whose meaning is not known. The message says which and why."""


def damaged(name: str, problem: str, hint: str | None = None) -> DamagedCheckpoint:
    """The error for a tensor whose parts do not fit each other."""
    return DamagedCheckpoint(problem, where=name, hint=hint or "the file is damaged, or its config is another model's")


def need(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check the shape of a part.

    Raises:
        DamagedCheckpoint: It is another.
    """
    if shape != expected:
        raise damaged(name, f"has the shape {list(shape)}, but the codes that it belongs to need {list(expected)}")


def said_dtype(config: Mapping[str, Any] | None, scale: str | None = None) -> str:
    """What decoded tensors are said to be: the config's dtype, else that of 16-bit scales, else bfloat16."""
    for place in (config or {}, *(v for v in (config or {}).values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            try:
                return parse_dtype(place[key])
            except (KeyError, RecipeError):
                continue
    return scale if scale is not None and DTYPES[scale].itemsize == 2 else "BF16"
