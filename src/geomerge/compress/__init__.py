"""Many experts in little room: one merged task vector, and one bit an element for each of them.

from geomerge.compress import compress, extract

compress("base", {"chat": "./chat", "code": "./code"}, "packed/")
extract("packed/", "code", "code-again/", base="base")
"""

from __future__ import annotations

from geomerge.compress.extract import extract
from geomerge.compress.pack import Packed, compress

__all__ = ["Packed", "compress", "extract"]
