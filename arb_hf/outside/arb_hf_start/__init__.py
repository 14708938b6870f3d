"""Starts arb_hf's command line without importing arb_hf: ``--help`` and ``inspect`` need not wait for torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def parser() -> ModuleType:
    """:mod:`arb_hf.light.parser`, loaded by its place and not through its package."""
    found = importlib.util.find_spec("arb_hf")  # finds, does not run
    if found is None or not found.submodule_search_locations:
        raise ImportError("arb_hf is not installed")
    folder = Path(found.submodule_search_locations[0]) / "light"
    spec = importlib.util.spec_from_file_location(
        "arb_hf_light", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"arb_hf is damaged: there is no {folder}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["arb_hf_light"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("arb_hf_light.parser")


def main() -> int:
    """The script ``arb-hf``."""
    return parser().main()
