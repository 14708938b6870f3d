"""Options of single modules: ``ArbConfig(overrides={pattern: options or None})``.

A pattern is a glob over a module's full name (``*`` and ``?`` also match dots, ``[01]`` one of the characters). It
covers the modules it matches and everything inside them: ``"model.layers.0"`` covers a whole decoder layer,
``"*.down_proj"`` every down projection. Of several patterns that cover a module the one with the most literal
characters counts, in any order (``config.json`` does not keep it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from .errors import ArbCalibrationError

Overrides = Mapping[str, Mapping[str, Any] | None]
_WILD = re.compile(r"\[[^]]*\]|[*?]")


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's name or that of a module it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def select(overrides: Overrides, name: str) -> str | None:
    """Find the pattern that decides for a module, or None.

    Raises:
        ArbCalibrationError: two equally specific patterns with different options cover the module.
    """
    found = sorted((pattern for pattern in overrides if covers(pattern, name)), key=_literals, reverse=True)
    if len(found) > 1 and _literals(found[0]) == _literals(found[1]) and overrides[found[0]] != overrides[found[1]]:
        raise ArbCalibrationError(
            f"overrides {found[0]!r} and {found[1]!r} both cover {name} and are equally specific; "
            "spell out more of the name in the one that should count"
        )
    return found[0] if found else None


def _literals(pattern: str) -> int:
    return len(_WILD.sub("", pattern))
