"""Models in llama.cpp's GGUF files."""

from geomerge.checkpoint.gguf.files import gguf_files, read_gguf

__all__ = ["gguf_files", "read_gguf"]
