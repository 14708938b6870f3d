"""Starts arb_hf's command line before arb_hf itself has run: ``--help`` and ``inspect`` need not wait for torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Found(ModuleType):
    """A package that was found and has not run yet: it runs when something is asked of it that it does not have."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def parser() -> ModuleType:
    """:mod:`arb_hf.cli.parser`, imported while arb_hf is only found."""
    if "arb_hf" not in sys.modules:
        spec = importlib.util.find_spec("arb_hf")
        if spec is None or spec.loader is None:
            raise ImportError("arb_hf is not installed")
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Found
        sys.modules["arb_hf"] = package
    return importlib.import_module("arb_hf.cli.parser")


def main() -> int:
    """Run the script ``arb-hf``."""
    return parser().main()
