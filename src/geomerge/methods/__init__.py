"""The mathematics of merging."""
