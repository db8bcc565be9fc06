"""Small language models with six skills, one expert for each: see `geomerge.lab.skills.kind`."""

from geomerge.lab.skills.kind import KIND

__all__ = ["KIND"]
