"""Damaged inputs for every reader: see test_fuzz."""
