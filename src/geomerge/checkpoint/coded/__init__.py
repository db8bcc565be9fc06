"""Weights that are stored as codes: what stands for them in a file, and how they are decoded piece by piece."""

from geomerge.checkpoint.coded.base import Coded, Parts
from geomerge.checkpoint.coded.find import Decoding, find_coded
from geomerge.checkpoint.coded.quantisation import quantisation

__all__ = ["Coded", "Decoding", "Parts", "find_coded", "quantisation"]
