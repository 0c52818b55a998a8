"""The mutation run: does the suite see a change of the code? `scripts/mutate.py` is its command."""
