"""Everything is declared in setup.cfg; this file lets pip install in editable mode."""

from setuptools import setup

setup()
