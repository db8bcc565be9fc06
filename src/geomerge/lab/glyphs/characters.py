"""Which characters belong to which task, and in which of matplotlib's bundled faces they are drawn."""

from __future__ import annotations

TITLES = {
    "handwritten": "handwritten digits (scikit-learn's)",
    "printed": "printed digits",
    "upper": "capital Latin letters",
    "lower": "small Latin letters",
    "greek": "small Greek letters",
    "cyrillic": "small Cyrillic letters",
    "math": "mathematical symbols",
    "shapes": "arrows and shapes",
}

CLASSES = {
    "handwritten": "0123456789",
    "printed": "0123456789",
    "upper": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "lower": "abcdefghijklmnopqrstuvwxyz",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "math": "∀∂∃∅∇∈∉∋∏∑√∝∞∠∧∨∩∪∫∴≈≠≡≤≥⊂⊃⊕⊗⊥",
    "shapes": "←↑→↓↔↕↖↗↘↙⇐⇑⇒⇓⇔■□▲△▶▷▼▽◀◁◆◇○●◐◑◒◓",
}
"""The classes of every task, in the order of their labels."""

BASE_RANGES = (
    (0x0531, 0x0556),  # Armenian capitals
    (0x0561, 0x0586),  # Armenian small letters
    (0x10D0, 0x10F0),  # Georgian
    (0x05D0, 0x05EA),  # Hebrew
    (0x0250, 0x0270),  # turned and hooked letters of the phonetic alphabet
    (0x1401, 0x1407),  # Canadian syllabics
    (0x2D30, 0x2D55),  # Tifinagh
    (0x2654, 0x2667),  # chess men and suits
    (0x2500, 0x2510),  # box drawing
    (0x20A0, 0x20B5),  # currencies
)
"""What the base is trained on: no character of a task, but strokes, arcs and corners of all kinds."""

BASE_EXTRAS = '!"#$%&()*+/<>?@[]{}~§¶†‡ßðþæøđŋ'

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
    "cmti10",
)
"""Faces by their file's name. A character is drawn in those that have it."""

_ASCII_ONLY = {"cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"}
"""Computer Modern's faces keep other characters under code points that mean something else."""


def base_characters() -> str:
    """The base's classes, in the order of their labels."""
    characters = "".join(chr(code) for first, last in BASE_RANGES for code in range(first, last + 1)) + BASE_EXTRAS
    taken = set("".join(CLASSES.values()))
    return "".join(dict.fromkeys(c for c in characters if c not in taken))


def may_have(face: str, character: str) -> bool:
    """Whether a face's table of characters can be believed about this one."""
    return face not in _ASCII_ONLY or (character.isascii() and character.isalnum())
