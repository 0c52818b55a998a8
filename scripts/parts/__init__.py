"""The parts of the test suite: `scripts/run_tests.py` is their command."""
