"""Builds the package.  Metadata and tools are in pyproject.toml."""

from setuptools import setup

setup()
