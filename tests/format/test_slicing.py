"""Cut matrices: every piece stands for exactly the values of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf.checks import check_values
from arb_hf.format.form import SCALE_DTYPES
from arb_hf.format.packing import pack, unpack
from arb_hf.format.slicing import cut_columns, cut_rows
from arb_hf.nn import BinaryLinear
from helpers.weights import FORMS, activations, random_weight

BLOCKS = (32, 64, 128, 192)


def checked(tensors, form) -> torch.Tensor:
    """The dense values of a piece, whose tensors are what its form says and pass a checkpoint's checks."""
    assert {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()} == form.tensors()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    layer = BinaryLinear(form)
    layer.load_state_dict(tensors)
    check_values(torch.nn.Sequential(layer), {})
    return unpack(tensors, form).dequantize()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_are_the_whole(data):
    form, dtype = data.draw(st.sampled_from(FORMS)), data.draw(st.sampled_from(sorted(SCALE_DTYPES)))
    block, n, m = data.draw(st.sampled_from(BLOCKS)), data.draw(st.integers(1, 70)), data.draw(st.integers(1, 400))
    weight = random_weight((n, m), block, form, dtype, seed=data.draw(st.integers(0, 9)))
    tensors = pack(weight)
    whole = unpack(tensors, weight.form).dequantize()
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    assert torch.equal(checked(*cut_rows(tensors, weight.form, start, stop)), whole[start:stop])
    start = 32 * data.draw(st.integers(0, (m - 1) // 32))
    stop = min(m, start + 32 * data.draw(st.integers(1, 12)))
    piece, cut = cut_columns(tensors, weight.form, start, stop)
    assert torch.equal(checked(piece, cut), whole[:, start:stop])
    assert block % cut.block_size == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cuts_at_blocks_keep_them_and_cuts_inside_make_them_smaller(form):
    weight = random_weight((16, 576), 128, form, "int8")
    tensors = pack(weight)
    sizes = [
        cut_columns(tensors, weight.form, *cut)[1].block_size for cut in ((0, 256), (256, 576), (0, 192), (192, 384))
    ]
    assert sizes == [128, 128, 64, 64]
    assert cut_columns(tensors, weight.form, 0, 576)[1] == weight.form


def test_devices_that_share_a_matrix_add_up_to_it():
    weight = random_weight((48, 384), 128, (2, 2, True), "int8")
    whole = BinaryLinear.from_binary_weight(weight)
    x = activations(5, 384)
    parts, columns = [], torch.zeros(5, 48)
    for start in range(0, 384, 128):
        tensors, form = cut_columns(whole.packed, whole.form, start, start + 128)
        layer = BinaryLinear(form)
        layer.load_state_dict(tensors)
        columns += layer(x[:, start : start + 128])
    for start in range(0, 48, 16):
        tensors, form = cut_rows(whole.packed, whole.form, start, start + 16)
        layer = BinaryLinear(form)
        layer.load_state_dict(tensors)
        parts.append(layer(x))
    torch.testing.assert_close(columns, whole(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(parts, 1), whole(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("cut", "bounds", "message"),
    [
        (cut_rows, (4, 4), "there are no rows 4 to 4 in a matrix that has 16"),
        (cut_rows, (0, 17), "there are no rows 0 to 17 in a matrix that has 16"),
        (cut_columns, (-32, 32), "there are no columns -32 to 32 in a matrix that has 300"),
        (cut_columns, (0, 301), "there are no columns 0 to 301 in a matrix that has 300"),
        (cut_columns, (48, 96), "columns 48 to 96 of 300 cut a block of 128 inside a word of 32"),
        (cut_columns, (0, 100), "columns 0 to 100 of 300 cut a block of 128 inside a word of 32"),
    ],
)
def test_impossible_cuts_are_refused(cut, bounds, message):
    weight = random_weight((16, 300), 128, (2, 2, True))
    with pytest.raises(ValueError, match=message):
        cut(pack(weight), weight.form, *bounds)
