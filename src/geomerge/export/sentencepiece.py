"""Reading SentencePiece's model files: protocol buffers of pieces, their scores and types.

    ModelProto       1: SentencePiece (repeated)   2: TrainerSpec   3: NormalizerSpec
    SentencePiece    1: piece, text                2: score, float  3: type (1 normal if absent)
    TrainerSpec      3: model_type (1 unigram if absent, 2 BPE)
    NormalizerSpec   3: add_dummy_prefix           4: remove_extra_whitespaces (both true if absent)

Reference: ``sentencepiece_model.proto`` of SentencePiece (Kudo, Richardson 2018).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geomerge.errors import DamagedCheckpoint, ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The types of pieces; GGUF numbers a token's type in the same way."""


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model.

    Attributes:
        pieces: Text, score and type by id.
        bpe: Whether it was trained as BPE; else its scores are probabilities of a unigram model.
        dummy_prefix: A space goes before the text.
        remove_extra_whitespaces: Repeated spaces become one.
    """

    pieces: tuple[tuple[str, float, int], ...]
    bpe: bool
    dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> Pieces:
    """Read a ``tokenizer.model``.

    Raises:
        ModelError: It cannot be opened.
        DamagedCheckpoint: It is no SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from None
    pieces, kind, prefix, extra = [], 1, True, True
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                inner = dict(_fields(value))
                text, score = inner.get(1, b""), inner.get(2, bytes(4))
                assert isinstance(text, bytes)
                assert isinstance(score, bytes)
                pieces.append((text.decode(), struct.unpack("<f", score)[0], int(inner.get(3, NORMAL))))
            elif number == 2 and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(3, 1))
            elif number == 3 and isinstance(value, bytes):
                inner = dict(_fields(value))
                prefix, extra = bool(inner.get(3, 1)), bool(inner.get(4, 1))
    except (ValueError, IndexError, AssertionError, struct.error):
        raise DamagedCheckpoint("is no SentencePiece model, or is cut short", where=str(path)) from None
    if not pieces:
        raise DamagedCheckpoint("holds no pieces", where=str(path))
    return Pieces(tuple(pieces), kind == 2, prefix, extra)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number, and an integer or the bytes of anything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(wire)
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
