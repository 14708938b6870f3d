"""``examples/benchmarks/families.py`` as a module, and its tiny models made binary."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from helpers.process import ROOT

SCRIPT = ROOT / "examples" / "benchmarks" / "families.py"
_spec = importlib.util.spec_from_file_location("families", SCRIPT)
families = sys.modules.setdefault("families", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(families)


def save_family(family: str, folder: Path) -> Path:
    """Write a tiny model of the family, packed."""
    families.binarize(family, folder / "dense", folder / "packed")
    return folder / "packed"
