"""``python -m geomerge``: the same program as ``geomerge``."""

from geomerge.cli.app import run

if __name__ == "__main__":
    run()
