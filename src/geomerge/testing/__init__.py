"""Conformance tests for merge methods: those of geomerge, and your own.

A method that is registered gets them all with a few lines:

    import pytest
    from geomerge.testing import CHECKS, cases, check_properties_complete

    @pytest.mark.parametrize("case", cases("my_method"), ids=str)
    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(case, check):
        check(case)

    def test_lists_all_its_properties():
        check_properties_complete("my_method")

Give both functions ``parameters={"my_method": {"t": 0.5}}`` for parameters that have no default and cannot be 1.
"""

from geomerge.testing.conformance import CHECKS, Case, cases, check_properties_complete
from geomerge.testing.inputs import merge, models

__all__ = ["CHECKS", "Case", "cases", "check_properties_complete", "merge", "models"]
