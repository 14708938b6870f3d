"""Actions in child processes, forked from this one, which has imported everything and has a single thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def forked(action: Callable[[], object]) -> int:
    """Start the action; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        action()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a child; returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
