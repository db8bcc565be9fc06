"""glyphs: eight image-classification tasks for a small ViT, drawn from the fonts that matplotlib brings."""

from geomerge.lab.glyphs.kind import KIND

__all__ = ["KIND"]
