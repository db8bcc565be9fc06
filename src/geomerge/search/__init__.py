"""Searching a merge's coefficients with a budget: live candidates, a held-out score beside the searched one.

The package is called like its main function: ``geomerge.search("study.yml", "found/")``.
"""

from __future__ import annotations

from geomerge.verbs import call_as

call_as(__name__, "run")
