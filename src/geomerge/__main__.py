"""``python -m geomerge``: the same program as ``geomerge``."""

import sys

from geomerge.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
