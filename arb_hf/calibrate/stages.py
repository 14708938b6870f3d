"""Seconds per stage of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Adds the seconds of ``with clock(stage):`` to a run's, and to those since :meth:`restart`."""

    def __init__(self, total: dict[str, float]) -> None:
        self.total = total
        self.lap: dict[str, float] = {}

    def restart(self) -> None:
        self.lap = {}

    def add(self, stage: str, seconds: float) -> None:
        self.total[stage] = self.total.get(stage, 0.0) + seconds
        self.lap[stage] = self.lap.get(stage, 0.0) + seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)
