"""The form of a binary weight: which planes and scales it has, their shapes, and the bits they take.

The bottom room: the mathematics, the packed format and the kernels all speak of a weight's form in these terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import WORD

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
ABSMAX_DTYPE = torch.float16
# Stored tensors that hold scales and means, where a form has them.
SCALES = ("row_parameters", "column_scales", "salient_column_scales")


@dataclass(frozen=True)
class BinaryForm:
    """Everything about a binary weight except its values.

    Attributes:
        out_features, in_features: n and m of the dense weight ``[n, m]``.
        salient_columns: columns with a second sign, over all blocks.
        block_size: columns per block, a multiple of 32; the last block may be narrower.
        groups: 2 with a group bitmap, else 1.
        salient_groups: 2 with the column-group bitmap, else 1.
        has_column_scales: column scales and no means (arb-rc), or means and no column scales (the other methods).
        scale_dtype: storage type of scales and means, a key of ``SCALE_DTYPES``.
    """

    out_features: int
    in_features: int
    salient_columns: int
    block_size: int
    groups: int
    salient_groups: int
    has_column_scales: bool
    scale_dtype: str

    @property
    def blocks(self) -> int:
        return math.ceil(self.in_features / self.block_size)

    # Slots of the row parameters: first the scales (ordinary groups, then per salient group first and second order),
    # then the means (ordinary groups, then salient groups).

    @property
    def scale_slots(self) -> int:
        return self.groups + 2 * self.salient_groups

    @property
    def mean_slots(self) -> int:
        return 0 if self.has_column_scales else self.groups + self.salient_groups

    @property
    def slots(self) -> int:
        return self.scale_slots + self.mean_slots

    def salient_scale_slot(self, group: int, order: int) -> int:
        """Slot of the row scale of salient ``group`` (0 small, 1 large), ``order`` (0 first, 1 second)."""
        return self.groups + 2 * group + order

    def mean_slot(self, group: int) -> int:
        """Slot of the mean of an ordinary group."""
        return self.scale_slots + group

    def salient_mean_slot(self, group: int) -> int:
        """Slot of the mean of a salient group."""
        return self.scale_slots + self.groups + group

    @property
    def extra_column_scales(self) -> int:
        """Rows of ``salient_column_scales``: what ``column_scales``, of a row per ordinary group, has no room for."""
        return 2 * self.salient_groups - self.groups if self.has_column_scales else 0

    def column_scale(self, group: int, order: int) -> tuple[str, int]:
        """The stored tensor and its row that hold the column scales of salient ``group`` and ``order``.

        A salient column has two scales per group. They fill its places in ``column_scales`` first, in which ordinary
        columns keep a scale per group, and go on in ``salient_column_scales``.
        """
        place = 2 * group + order
        return ("column_scales", place) if place < self.groups else ("salient_column_scales", place - self.groups)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor, bias apart. :mod:`arb_hf.format.packing` says what they hold."""
        n, m, c = self.out_features, self.in_features, self.salient_columns
        words, salient_words = math.ceil(m / WORD), math.ceil(c / WORD)
        scale = SCALE_DTYPES[self.scale_dtype]
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((words, n), torch.int32),
            "second_plane": ((words if self.groups == 2 else salient_words, n), torch.int32),
            "salient_columns": ((math.ceil(m / 8),), torch.uint8),
            "row_parameters": ((self.blocks, self.slots, n), scale),
        }
        if self.salient_groups == 2:
            tensors["salient_groups"] = ((salient_words, n), torch.int32)
        if self.has_column_scales:
            tensors["column_scales"] = ((self.groups, m), scale)
            if self.extra_column_scales:
                tensors["salient_column_scales"] = ((self.extra_column_scales, c), scale)
        if self.scale_dtype == "int8":
            tensors["row_absmax"] = ((self.blocks, self.slots), ABSMAX_DTYPE)
        return tensors

    def bits(self) -> int:
        """All stored bits, padding included, bias apart."""
        return sum(math.prod(shape) * dtype.itemsize * 8 for shape, dtype in self.tensors().values())

    def bits_per_weight(self) -> float:
        """True bits: all stored bits over the weights they replace."""
        return self.bits() / (self.out_features * self.in_features)
