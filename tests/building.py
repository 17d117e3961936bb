"""setup.py as a module, for the tests."""

from __future__ import annotations

import importlib.util
import pathlib
import types

import pytest

# Skips the importing test module.
pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools >= 77")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def setup_module() -> types.ModuleType:
    """setup.py, imported: its compilers, flags and reasons."""
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
