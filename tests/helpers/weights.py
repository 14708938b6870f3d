"""Random binary weights of every form and shape, activations, and the error of a product with them."""

from __future__ import annotations

import torch
from torch import Tensor

from arb_hf.format.form import BinaryForm
from arb_hf.format.weight import BinaryWeight

Form = tuple[int, int, bool]  # groups, salient groups, column scales
FORMS: list[Form] = [(1, 1, True), (2, 1, True), (2, 2, True), (1, 1, False), (2, 1, False), (2, 2, False)]
# out_features, in_features, block_size: rows and columns that fill no register, no word, no byte; blocks of all widths
SHAPES = [(1, 1, 128), (5, 33, 32), (48, 128, 128), (33, 300, 128), (16, 131, 64), (70, 700, 256), (35, 1000, 1024)]


def random_weight(
    shape: tuple[int, int], block: int, form: Form, dtype: str = "float16", seed: int = 0, most: int = 25
) -> BinaryWeight:
    """A weight with random bits and scales and 0 to ``most`` salient columns in each block."""
    (n, m), (groups, salient_groups, by_column) = shape, form
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    def signs(*size: int) -> Tensor:
        return torch.randint(0, 2, size, generator=generator).to(torch.int8) * 2 - 1

    salient = torch.zeros(m, dtype=torch.bool)
    for start in range(0, m, block):
        width = min(block, m - start)
        count = int(torch.randint(0, min(most, width) + 1, (), generator=generator))
        salient[start + torch.randperm(width, generator=generator)[:count]] = True
    c = int(salient.sum())
    described = BinaryForm(n, m, c, block, groups, salient_groups, by_column, dtype)
    rows = uniform(described.blocks, described.slots, n) + 0.1
    rows[:, described.scale_slots :] -= 0.6
    extra = 2 * salient_groups - groups
    return BinaryWeight(
        form=described,
        signs=signs(n, m),
        second_signs=signs(n, c),
        groups=uniform(n, m) < 0.4 if groups == 2 else None,
        salient=salient,
        row_parameters=rows,
        column_scales=uniform(groups, m) + 0.5 if by_column else None,
        salient_column_scales=uniform(extra, c) + 0.5 if by_column and extra else None,
    )


def activations(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result: Tensor, expected: Tensor, x: Tensor, dense: Tensor) -> float:
    """Largest deviation of an output, relative to the size its terms have: |x| |row of W|."""
    size = x.float().norm(dim=1)[:, None] * dense.norm(dim=1)[None, :]
    return ((result.float() - expected.float()).abs() / size.clamp(min=1e-30)).max().item()
