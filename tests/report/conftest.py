"""The helpers beside the tests, and the samples of the tests above, can be imported."""

from __future__ import annotations

import sys
from pathlib import Path

for place in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(place) not in sys.path:
        sys.path.append(str(place))
