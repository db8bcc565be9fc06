"""Searching a merge's coefficients with a budget: live candidates, a held-out score beside the searched one."""
