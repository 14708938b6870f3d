"""The codec of int8 tables against what the format's page says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf.format.table import TableForm, pack_table, table_error, unpack_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def tables(draw: st.DrawFn) -> torch.Tensor:
    rows, width, seed = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from((1e-7, 1e-3, 1.0, 3e3)))
    table = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    table[draw(st.integers(0, rows - 1))] = draw(st.sampled_from((0.0, -0.0, 1.0, -1.0))) * scale
    return table.to(draw(st.sampled_from(DTYPES)))


@given(tables())
@settings(max_examples=200, deadline=None)
def test_what_is_stored_obeys_the_page(table):
    packed = pack_table(table)
    for name, (shape, dtype) in TableForm(*table.shape).tensors().items():
        assert packed[name].shape == shape and packed[name].dtype == dtype
    assert packed["weight"].min() >= -127
    absmax = packed["row_absmax"]
    assert absmax.isfinite().all() and not torch.signbit(absmax).any()
    assert torch.equal(absmax, table.float().abs().amax(1).to(torch.float16))
    assert not packed["weight"][absmax == 0].any(), "a row without a scale has no codes"


@given(tables())
@settings(max_examples=200, deadline=None)
def test_a_value_is_off_by_half_a_step_and_what_float16_rounds(table):
    dense = unpack_table(pack_table(table))
    largest = table.float().abs().amax(1, keepdim=True)
    float16 = 2**-25 + largest * 2**-11  # what rounding the scale may take from the largest value
    assert ((dense - table.float()).abs() <= largest / 254 * (1 + 2**-9) + float16).all()


@given(tables())
@settings(max_examples=50, deadline=None)
def test_a_stored_table_is_stored_as_it_is(table):
    packed = pack_table(table)
    again = pack_table(unpack_table(packed))
    assert torch.equal(again["row_absmax"], packed["row_absmax"]) or 0 < packed["row_absmax"].abs().max() < 1e-3
    assert torch.allclose(unpack_table(again), unpack_table(packed), rtol=1e-3, atol=1e-6)


def test_the_error_is_relative_to_the_whole_table():
    table = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    packed = pack_table(table)
    expected = ((unpack_table(packed) - table).norm() / table.norm()).item()
    assert table_error(table, packed) == pytest.approx(expected, rel=1e-5)
    assert table_error(torch.zeros(3, 4), pack_table(torch.zeros(3, 4))) == 0
    huge = torch.full((2, 4), 1e6)
    assert not table_error(huge, pack_table(huge)) <= 1, "float16 cannot hold the scale"


def test_chunks_change_nothing(monkeypatch):
    table = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    whole = pack_table(table)
    monkeypatch.setattr("arb_hf.format.table.CHUNK_ROWS", 7)
    parts = pack_table(table)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert torch.equal(unpack_table(parts), whole["weight"].float() * (whole["row_absmax"].float() / 127)[:, None])
