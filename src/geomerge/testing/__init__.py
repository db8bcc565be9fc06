"""Conformance tests for merge methods: those of geomerge, and your own.

A method that is registered gets them all with a few lines:

    import pytest
    from geomerge.testing import CHECKS, cases, check_processes_agree, check_properties_complete

    @pytest.mark.parametrize("case", cases("my_method"), ids=str)
    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(case, check):
        check(case)

    def test_lists_all_its_properties_and_depends_on_no_process():
        check_properties_complete("my_method")
        check_processes_agree("my_method")

Give these functions ``parameters={"my_method": {"t": 0.5}}`` for parameters that have no default and cannot be 1.
"""

from geomerge.testing.conformance import CHECKS, Case, cases, check_processes_agree, check_properties_complete
from geomerge.testing.inputs import merge, models

__all__ = ["CHECKS", "Case", "cases", "check_processes_agree", "check_properties_complete", "merge", "models"]
