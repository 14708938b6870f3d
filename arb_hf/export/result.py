"""What an export did, and what it lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exported:
    """Attributes:
    path: what was written.
    bytes: its size.
    matrices: how many binary matrices were written as which type.
    rounding: sqrt(|W - written|^2 / |W|^2) over all binary matrices: 0 says that nothing was lost.
    """

    path: str
    bytes: int
    matrices: dict[str, int]
    rounding: float

    def __str__(self) -> str:
        types = ", ".join(f"{count} matrices as {each}" for each, count in self.matrices.items())
        loss = f"relative rounding error {self.rounding:.1e}" if self.rounding else "exact"
        return f"written to {self.path}: {self.bytes / 1e6:,.1f} MB, {types} ({loss})"


class Rounding:
    """Adds up what matrices lose in a narrower type."""

    def __init__(self) -> None:
        self.lost = self.total = 0.0

    def add(self, exact: Tensor, written: Tensor) -> None:
        self.lost += (exact - written.to(exact.dtype)).square().sum(dtype=torch.float64).item()
        self.total += exact.square().sum(dtype=torch.float64).item()

    def relative(self) -> float:
        return (self.lost / self.total) ** 0.5 if self.total else 0.0
