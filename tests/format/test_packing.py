"""The packed format: round trips, exact bit counts, the layout its docstring promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf.format.form import SCALE_DTYPES, BinaryForm
from arb_hf.format.packing import pack, pack_bits, pack_mask, stored_order, unpack, unpack_bits, unpack_mask
from arb_hf.format.weight import BinaryWeight


@st.composite
def binary_weights(draw) -> BinaryWeight:
    """Any form, any shape, random planes and scales; not necessarily what a method would find."""
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    block_size = draw(st.sampled_from([32, 64, 96, 128, 4096]))
    groups = draw(st.integers(1, 2))
    salient_groups = draw(st.integers(1, groups))
    columns = draw(st.booleans())
    dtype = draw(st.sampled_from(sorted(SCALE_DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def bits(*shape: int, share: float = 0.5) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < share

    salient = bits(m, share=draw(st.sampled_from([0.0, 0.1, 1.0])))
    count = int(salient.sum())
    form = BinaryForm(n, m, count, block_size, groups, salient_groups, columns, dtype)
    large = bits(n, m) if groups == 2 else None
    if large is not None and salient_groups == 1:
        large[:, salient] = False
    extra = 2 * salient_groups - groups
    return BinaryWeight(
        form=form,
        signs=bits(n, m).to(torch.int8) * 2 - 1,
        second_signs=bits(n, count).to(torch.int8) * 2 - 1,
        groups=large,
        salient=salient,
        row_parameters=torch.randn(form.blocks, form.slots, n, generator=generator),
        column_scales=torch.rand(groups, m, generator=generator) + 0.1 if columns else None,
        salient_column_scales=torch.rand(extra, count, generator=generator) + 0.1 if columns and extra else None,
    )


def assert_same(actual: BinaryWeight, expected: BinaryWeight) -> None:
    assert actual.form == expected.form
    for name in BinaryWeight.__dataclass_fields__:
        one, other = getattr(actual, name), getattr(expected, name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other), name
        else:
            assert one == other, name


@settings(max_examples=80, deadline=None)
@given(binary_weights())
def test_unpacking_gives_what_was_packed(weight):
    assert_same(unpack(pack(weight), weight.form), weight.rounded())


@settings(max_examples=40, deadline=None)
@given(binary_weights())
def test_packing_twice_changes_nothing(weight):
    packed = pack(weight)
    again = pack(unpack(packed, weight.form))
    assert {name: tensor.dtype for name, tensor in packed.items()} == {name: t.dtype for name, t in again.items()}
    planes = [name for name in packed if packed[name].dtype in (torch.int32, torch.uint8)]
    assert all(torch.equal(packed[name], again[name]) for name in planes)


@settings(max_examples=60, deadline=None)
@given(binary_weights())
def test_tensors_are_those_of_the_form_and_their_bits_are_counted(weight):
    packed = pack(weight)
    promised = weight.form.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.items()} == promised
    stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in packed.values())
    assert stored == weight.form.bits()
    assert weight.bits_per_weight() == stored / (weight.shape[0] * weight.shape[1])


def theoretical_bits(form: BinaryForm, scale_bits: int = 16) -> float:
    """Planes, bitmaps, row and column numbers, without any padding."""
    n, m, c = form.out_features, form.in_features, form.salient_columns
    bits = n * (m - c) + 2 * n * c + m
    if form.groups == 2:
        bits += n * m if form.salient_groups == 2 else n * (m - c)
    rows = form.scale_slots + form.mean_slots
    bits += scale_bits * rows * n * form.blocks
    if form.has_column_scales:
        bits += scale_bits * (form.groups * (m - c) + 2 * form.salient_groups * c)
    return bits


@pytest.mark.parametrize(("n", "m"), [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096)])
@pytest.mark.parametrize(("groups", "salient_groups"), [(2, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("columns", [True, False])
def test_stored_bits_are_within_three_percent_of_theory(n, m, groups, salient_groups, columns):
    form = BinaryForm(n, m, round(0.05 * m), 128, groups, salient_groups, columns, "float16")
    assert theoretical_bits(form) <= form.bits() <= 1.03 * theoretical_bits(form)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 100), st.integers(0, 2**31))
def test_bits_round_trip(rows, columns, seed):
    bits = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(bits)
    assert words.shape == (math.ceil(columns / 32), rows)
    assert torch.equal(unpack_bits(words, columns), bits)


def test_bit_positions():
    bits = torch.zeros(2, 40, dtype=torch.bool)
    bits[0, 0] = bits[0, 31] = bits[1, 33] = True
    assert pack_bits(bits).tolist() == [[1 - 2**31, 0], [0, 2]]
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert pack_mask(mask).tolist() == [9, 2]
    assert torch.equal(unpack_mask(pack_mask(mask), 12), mask)


def test_stored_order_puts_salient_columns_first_in_each_block():
    salient = torch.zeros(70, dtype=torch.bool)
    salient[[5, 31, 32, 69]] = True
    order = stored_order(salient, 32).tolist()
    assert order[:3] == [5, 31, 0]
    assert order[32:35] == [32, 33, 34]
    assert order[64:] == [69, 64, 65, 66, 67, 68]
    assert sorted(order) == list(range(70))
