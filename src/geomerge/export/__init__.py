"""Models in other programs' formats: llama.cpp's GGUF.

`families` says which architectures there are and what their metadata is, `tensors` what becomes of each tensor, `vocabulary`
how the tokenizer is written, `write` makes the file.
"""

from geomerge.export.families import FAMILIES
from geomerge.export.write import TYPES, Exported, export_gguf

__all__ = ["FAMILIES", "TYPES", "Exported", "export_gguf"]
