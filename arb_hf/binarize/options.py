"""The choices that shape the mathematics of one matrix."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..format.form import BinaryForm
from .methods import METHODS

SALIENT_METRICS = ("hessian", "magnitude")
REFINEMENTS = ("full", "paper")
# Type of the stored scales of each refinement, where none is chosen.
SCALE_DTYPE = {"full": "int8", "paper": "float16"}


@dataclass(frozen=True)
class BinarizeOptions:
    """How one weight matrix is binarized. Checked by :class:`arb_hf.ArbConfig`, which documents each field but the last.

    ``scale_dtype=None`` becomes the type that belongs to the refinement. ``salient_columns``: the number of salient columns
    that ``refinement="full"`` takes; None: as many as bring the stored bits to those of the published form. A run with
    ``bits`` sets it for each matrix.
    """

    method: str = "arb-rc"
    block_size: int = 128
    column_group_bitmap: bool = True
    group_bitmap: bool = True
    iterations: int = 15
    salient_metric: str = "hessian"
    max_salient_columns: int = 50
    damping: float = 0.01
    refinement: str = "full"
    scale_dtype: str = None  # type: ignore[assignment]  # always set once made
    salient_columns: int | None = None

    def __post_init__(self) -> None:
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", SCALE_DTYPE[self.refinement])

    @classmethod
    def of(cls, config: Any) -> BinarizeOptions:
        """The options among a config's attributes (an :class:`arb_hf.ArbConfig`, or options already)."""
        return config if isinstance(config, cls) else cls(**{name: getattr(config, name) for name in CHOSEN_BY_USERS})

    def form(
        self, out_features: int, in_features: int, salient_columns: int, scale_dtype: str | None = None
    ) -> BinaryForm:
        """The form of a matrix binarized with these options."""
        return BinaryForm(
            out_features=out_features,
            in_features=in_features,
            salient_columns=salient_columns,
            block_size=self.block_size,
            groups=2 if self.group_bitmap else 1,
            salient_groups=2 if self.group_bitmap and self.column_group_bitmap else 1,
            has_column_scales=METHODS[self.method].has_column_scales,
            scale_dtype=scale_dtype or self.scale_dtype,
        )


# The fields that are options of a config too.
CHOSEN_BY_USERS = tuple(each.name for each in fields(BinarizeOptions) if each.name != "salient_columns")
