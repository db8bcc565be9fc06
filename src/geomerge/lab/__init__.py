"""Suites of small experts that share a base, made on this machine: something to merge, and tasks to judge it by."""
