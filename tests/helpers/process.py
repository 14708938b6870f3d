"""Where the tests are, and new Python processes that run from this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the checkout and the helpers importable, and ``changes``."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"} | changes


def fresh_process(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process; its output is captured. ``changes``: to the environment."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), timeout=300)
