"""Packed codes among a checkpoint's tensors: what their shapes say, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from geomerge.checkpoint.coded.base import CannotDecode, Coded, damaged, need, said_dtype
from geomerge.checkpoint.coded.packed import WORD, Awq, Gptq, RowPacked
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.header import TensorInfo

Tensors = Mapping[str, TensorInfo]
Config = Mapping[str, Any] | None
Read = Callable[[TensorInfo], bytes]

_PACKED, _QWEIGHT = ".weight_packed", ".qweight"


def find_row_packed(quantization: Mapping[str, Any], tensors: Tensors, config: Config, read: Read) -> dict[str, Coded]:
    """compressed-tensors' ``pack-quantized`` layers.

    Raises:
        CannotDecode: The codes are of another kind (4-bit floats).
        DamagedCheckpoint: The parts of a layer do not fit each other.
    """
    found: dict[str, Coded] = {}
    for name, words in tensors.items():
        if not name.endswith(_PACKED):
            continue
        stem = name.removesuffix("_packed")
        if words.dtype != "I32" or len(words.shape) != 2:
            raise CannotDecode(f"{name} is no matrix of 32-bit words")
        scale, shape = tensors.get(f"{stem}_scale"), tensors.get(f"{stem}_shape")
        if scale is None or shape is None or shape.dtype not in ("I64", "I32") or shape.shape != (2,):
            raise damaged(name, "has no scales or no shape beside it")
        rows, columns = _numbers(shape, read)
        zero, groups = tensors.get(f"{stem}_zero_point"), tensors.get(f"{stem}_g_idx")
        bits = _bits(name, columns, words.shape[1], quantization)
        need(name, words.shape, (rows, -(-columns * bits // WORD)))
        _check_scale(scale)
        high, wide = (scale.shape[0], prod(scale.shape[1:])) if scale.shape else (1, 1)
        if high not in (1, rows) or wide < 1:
            raise damaged(scale.name, f"has the shape {list(scale.shape)}, which does not fit {rows} rows")
        if zero is not None:
            if zero.dtype != "I32":
                raise CannotDecode(f"{zero.name} is not packed")
            need(zero.name, zero.shape, (-(-rows * bits // WORD), wide))
        if groups is not None:
            _check_groups(groups, columns)
        group = _group(quantization, columns, wide)
        found[stem] = RowPacked(
            name=stem,
            dtype=said_dtype(config, scale.dtype),
            shape=(rows, columns),
            words=name,
            scale=scale.name,
            zero=_name(zero),
            groups=_name(groups),
            bits=bits,
            group=group,
            wide=DTYPES[scale.dtype].itemsize > 2,
        )
    return found


def shapes_stored(tensors: Tensors) -> set[str]:
    """The tensors that only say how large others are."""
    return {name for name in tensors if name.endswith(".weight_shape") and f"{name[:-6]}_packed" in tensors}


def find_transposed(quantization: Mapping[str, Any], tensors: Tensors, config: Config) -> dict[str, Coded]:
    """The layers of GPTQ and AWQ checkpoints; which of the two it is shows in the shapes.

    Raises:
        CannotDecode: Codes of 3 bits, or another kernel's layout.
        DamagedCheckpoint: The parts of a layer do not fit each other.
    """
    found: dict[str, Coded] = {}
    # AutoGPTQ calls it checkpoint_format, GPTQModel format as well.
    layouts = {str(quantization[k]) for k in ("checkpoint_format", "format") if quantization.get(k)}
    for name, words in tensors.items():
        if not name.endswith(_QWEIGHT):
            continue
        stem = name.removesuffix(_QWEIGHT)
        scale, zero, groups = (tensors.get(f"{stem}.{part}") for part in ("scales", "qzeros", "g_idx"))
        if scale is None or zero is None:
            raise CannotDecode(f"{name} has no scales or no zero points beside it: another kernel's layout")
        if words.dtype != "I32" or zero.dtype != "I32" or len(words.shape) != 2 or len(scale.shape) != 2:
            raise CannotDecode(f"{name} and what belongs to it are no matrices of 32-bit words")
        _check_scale(scale)
        count, rows = scale.shape
        if count < 1 or rows < 1:
            raise damaged(scale.name, f"has the shape {list(scale.shape)}")
        bits = _packed_bits(zero, count, rows)
        of_gptq = words.shape[1] == rows
        if not of_gptq and (str(quantization.get("version", "gemm")).lower() != "gemm" or bits != 4):
            raise CannotDecode(f"{name} is laid out for another kernel than AWQ's gemm")
        if of_gptq and not layouts <= {"gptq", "gptq_v2"}:
            raise CannotDecode(f"{name} is laid out as {' or '.join(sorted(layouts))}")
        columns = words.shape[0] * (WORD // bits) if of_gptq else words.shape[0]
        need(name, words.shape, (columns * bits // WORD, rows) if of_gptq else (columns, rows * bits // WORD))
        if groups is not None:
            _check_groups(groups, columns)
        weight = f"{stem}.weight"
        common: dict[str, Any] = {
            "name": weight,
            "dtype": said_dtype(config, scale.dtype),
            "shape": (rows, columns),
            "words": name,
            "scale": scale.name,
            "zero": zero.name,
            "groups": _name(groups),
            "bits": bits,
            "group": _group(quantization, columns, count),
            "wide": DTYPES[scale.dtype].itemsize > 2,
        }
        found[weight] = Gptq(**common, offset=0 if "gptq_v2" in layouts else 1) if of_gptq else Awq(**common)
    return found


def empty_biases(tensors: Tensors, read: Read) -> Iterator[str]:
    """Biases of GPTQ layers that are all zero: its tools write them for layers that have none."""
    for name in tensors:
        bias = tensors.get(f"{name.removesuffix(_QWEIGHT)}.bias") if name.endswith(_QWEIGHT) else None
        if bias is not None and len(bias.shape) == 1 and not any(read(bias)):
            yield bias.name


def _numbers(info: TensorInfo, read: Read) -> tuple[int, int]:
    data = read(info)
    size = len(data) // 2
    rows, columns = (int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
    if rows < 1 or columns < 1:
        raise damaged(info.name, f"says that the weight has the shape [{rows}, {columns}]")
    return rows, columns


def _bits(name: str, columns: int, width: int, quantization: Mapping[str, Any]) -> int:
    """The number of bits that a row of so many words has room for, as the config says where several do."""
    possible = [b for b in range(1, 9) if -(-columns * b // WORD) == width]
    groups = quantization.get("config_groups")
    stated = [
        group["weights"].get("num_bits")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    chosen = [b for b in possible if b in stated] or (possible if not stated else [])
    if len(chosen) != 1:
        said = f"; the config says {', '.join(map(str, stated))} bits" if stated else ""
        raise damaged(name, f"has {width} words for rows of {columns} codes{said}")
    return chosen[0]


def _packed_bits(zero: TensorInfo, count: int, rows: int) -> int:
    for bits in (2, 4, 8):
        if zero.shape == (count, rows * bits // WORD) and rows * bits % WORD == 0:
            return bits
    if zero.shape == (count, -(-rows * 3 // WORD)):
        raise CannotDecode(f"{zero.name} holds codes of 3 bits")
    raise damaged(
        zero.name, f"has the shape {list(zero.shape)}, which does not fit {count} groups of {rows} zero points"
    )


def _check_scale(scale: TensorInfo) -> None:
    if DTYPES[scale.dtype].kind != "float":
        raise CannotDecode(f"{scale.name} holds scales of the dtype {DTYPES[scale.dtype].recipe}")


def _check_groups(groups: TensorInfo, columns: int) -> None:
    if groups.dtype not in ("I32", "I64"):
        raise damaged(groups.name, f"has the dtype {DTYPES[groups.dtype].recipe}")
    need(groups.name, groups.shape, (columns,))


def _group(quantization: Mapping[str, Any], columns: int, count: int) -> int:
    """Columns in a group: as the config says where that fits, else all groups are equal."""
    places = [quantization.get("group_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        places.append(weights.get("group_size") if isinstance(weights, dict) else None)
    for said in places:
        if type(said) is int and said > 0 and -(-columns // said) == count:
            return said
    return -(-columns // count)


def _name(info: TensorInfo | None) -> str | None:
    return None if info is None else info.name
