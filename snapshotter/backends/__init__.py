"""Snapshot backends: one contract (`base`), one test suite over all of them."""
