"""What one of several devices has of a packed matrix; vLLM is not needed."""

from __future__ import annotations

import pytest
import torch

from arb_hf.format.packing import pack, unpack
from arb_hf.format.slicing import cut_rows, join_rows
from arb_hf.serving.pieces import cut_piece, rank_rows
from helpers.process import fresh_process
from helpers.weights import FORMS, random_weight


def test_devices_share_rows_evenly():
    assert [rank_rows([64], [32], rank, 2) for rank in range(2)] == [[(0, 32)], [(32, 64)]]


def test_matrices_that_lie_one_after_the_other_are_divided_each():
    assert rank_rows([64, 32, 32], [32, 16, 16], 1, 2) == [(32, 64), (80, 96), (112, 128)]


def test_neighbours_share_a_matrix_of_fewer_pieces_than_devices():
    assert [rank_rows([32, 16], [8, 8], rank, 4)[1] for rank in range(4)] == [(32, 40), (32, 40), (40, 48), (40, 48)]


def test_devices_that_have_all_rows_have_all():
    assert [rank_rows([48], [48], rank, 3) for rank in range(3)] == [[(0, 48)]] * 3


@pytest.mark.parametrize(("total", "size", "ranks"), [(50, 32, 2), (64, 0, 2), (64, 32, 3)])
def test_rows_that_do_not_divide_are_refused(total, size, ranks):
    with pytest.raises(ValueError, match=f"{total} rows cannot be divided into {size} for each of {ranks} devices"):
        rank_rows([total], [size], 0, ranks)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_piece_of_rows_and_columns_has_the_values_of_the_whole(form):
    weight = random_weight((40, 300), 128, form, "int8")
    packed = pack(weight)
    whole = unpack(packed, weight.form).dequantize()
    piece = cut_piece(packed, weight.form, [(8, 24), (32, 40)], (64, 192))
    assert torch.equal(piece.binary_weight().dequantize(), torch.cat([whole[8:24], whole[32:40]])[:, 64:192])
    assert not any(parameter.requires_grad for parameter in piece.parameters())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pieces_joined_are_the_whole(form):
    weight = random_weight((40, 300), 128, form, "float16")
    packed = pack(weight)
    tensors, joined = join_rows([cut_rows(packed, weight.form, *rows) for rows in ((0, 13), (13, 14), (14, 40))])
    assert joined == weight.form
    assert all(torch.equal(tensors[name], packed[name]) for name in packed)


def test_the_package_needs_no_vllm():
    result = fresh_process("import arb_hf.serving, sys; print('vllm' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr
