"""A device that is no processor's memory, for the tests of what is computed on one where there is no accelerator.

It is torch's own place for other devices, and computes what the processor does. But it is as strict as an accelerator: it
does not mix its tensors with the processor's, these cannot be had as NumPy arrays, and they lie at no address.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration as backends

NAME = "elsewhere"
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
"""They may mix devices."""
_INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}
"""Whose indices may be the processor's."""
_DIRECT = ("empty.memory_format", "empty_strided", "copy_", "_to_copy", "lift_fresh", "lift")
"""What torch calls by itself, without asking the tensors' class."""


class Elsewhere(Tensor):
    """A tensor of this device, which has its numbers in one of the processor's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        with torch.inference_mode(mode=False):  # torch makes no views of such as are made within
            made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=torch.device(NAME, 0),
            )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Copied, as from any device."""
        return self.inner.tolist()

    def data_ptr(self) -> int:
        """There is no address here that the processor knows."""
        raise RuntimeError("nobody may look for it")

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(op, *args, **(kwargs or {}))


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What the processor does with these tensors, kept here."""
    name = op._schema.name
    given = list(_tensors((*args, *kwargs.values())))
    here = [x for x in given if isinstance(x, Elsewhere)]
    if here and name not in _COPIES:
        for x in given[:1] if name in _INDEXED else given:
            if not isinstance(x, Elsewhere) and x.dim():
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, found {NAME} and {x.device}"
                )
    device, stays = kwargs.get("device"), bool(here)
    if device is not None:
        stays = torch.device(device).type == NAME
        kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
    made = op(*map(_inner, args), **{key: _inner(x) for key, x in kwargs.items()})
    owners = {} if device is not None else {id(_inner(x)): x for x in given}

    def placed(x: Any) -> Any:
        if isinstance(x, Tensor):
            return owners[id(x)] if id(x) in owners else Elsewhere(x) if stays else x
        return type(x)(map(placed, x)) if isinstance(x, list | tuple) else x

    return placed(made)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments; torch's own walks through trees take ten times as long as most operations."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _inner(x: Any) -> Any:
    """The processor's tensors of this device's ones."""
    if isinstance(x, list | tuple):
        return type(x)(map(_inner, x))
    return x.inner if isinstance(x, Elsewhere) else x


class _Module(backends._DummyBackendModule):
    """Whoever looks for an accelerator by himself finds none."""

    def is_available(self) -> bool:
        return False


def begin() -> None:
    """Make the device known to torch, for as long as the process lives."""
    if not _libraries:
        backends._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _libraries.extend([torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")])
        _libraries[0].fallback(_compute, "PrivateUse1")
        for name in _DIRECT:
            op, _, overload = name.partition(".")
            found = getattr(getattr(torch.ops.aten, op), overload or "default")
            _libraries[1].impl(name, functools.partial(_compute, found), "PrivateUse1")


_libraries: list[Any] = []
