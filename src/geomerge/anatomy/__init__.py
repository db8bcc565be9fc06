"""Which tensor is what: its block, its depth, its role, its twin, and whether it is merged at all.

    names and shapes, config.json ──read──▶ Anatomy ──▶ one Part a tensor

`families.py` is the table of known families, `roles.py` the table of roles, `generic.py` does for everything else.
Nothing here opens a file, imports torch, or knows about merging.
"""

from geomerge.anatomy.anatomy import Anatomy, Part, read, rename
from geomerge.anatomy.roles import ROLES
from geomerge.anatomy.summary import summary

__all__ = ["ROLES", "Anatomy", "Part", "read", "rename", "summary"]
