"""``python -m geomerge.methods.native``: build the compiled loops, for all levels of processors that the compiler knows."""

import sys

from geomerge.methods.native.build import build_all

sys.exit(build_all())
