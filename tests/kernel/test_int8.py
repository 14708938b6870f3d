"""The matmul with int8 rows: every kernel against the reference, and what torch knows of the operator."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arb_hf import native
from arb_hf.format.table import pack_table, unpack_table
from arb_hf.kernels import int8, int8_linear, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SHAPES = ((1, 1), (5, 7), (64, 16), (65, 31), (130, 47), (200, 96), (333, 160))
needs_library = pytest.mark.skipif(native.library() is None, reason="the C library was not built")


def table(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack_table(torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width)))
    return packed["weight"], packed["row_absmax"]


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17, 40])
def test_the_operator_computes_what_the_dense_table_does(dtype, tokens):
    for rows, width in SHAPES:
        weight, absmax = table(rows, width)
        x = activations(tokens, width, dtype=dtype)
        dense = unpack_table({"weight": weight, "row_absmax": absmax}, torch.float64)
        found = int8_linear(x, weight, absmax)
        assert found.dtype == dtype and off(found, x.double() @ dense.T) < TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_computes_the_same(isa, dtype, monkeypatch):
    if native.ISAS.index(isa) > native.require().arb_cpu_isa():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(native, "isa", lambda: native.ISAS.index(isa))
    for rows, width in SHAPES:
        weight, absmax = table(rows, width)
        for tokens in (1, 3, 7):
            x = activations(tokens, width, dtype=dtype)
            expected = int8.reference(x, weight, absmax)
            assert off(int8.linear_few(x, weight, absmax), expected) < TOLERANCE[dtype]


@needs_library
def test_the_number_of_threads_changes_nothing():
    weight, absmax = table(4000, 96)
    x = activations(5, 96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(int8.linear_few(x, weight, absmax))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


@needs_library
def test_a_token_does_not_depend_on_those_beside_it():
    weight, absmax = table(130, 47)
    x = activations(9, 47)
    together = int8.linear_few(x, weight, absmax)
    for token in range(9):
        assert torch.equal(int8.linear_few(x[token : token + 1], weight, absmax)[0], together[token])


def test_without_c_the_result_is_the_same(monkeypatch):
    weight, absmax = table(130, 47)
    x = activations(3, 47)
    expected = int8.reference(x, weight, absmax)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    ops.kernel_for.cache_clear()
    assert off(int8_linear(x, weight, absmax), expected) < 2e-6
    ops.kernel_for.cache_clear()


def test_tiles_of_the_table_change_nothing(monkeypatch):
    weight, absmax = table(333, 160)
    x = activations(40, 160)
    whole = int8_linear(x, weight, absmax), int8.linear_transposed(activations(3, 333), weight, absmax)
    monkeypatch.setattr(int8, "TILE_NUMBERS", 160 * 50)
    assert off(int8_linear(x, weight, absmax), whole[0]) < 1e-6
    assert off(int8.linear_transposed(activations(3, 333), weight, absmax), whole[1]) < 1e-6


@pytest.mark.parametrize("tokens", [2, 30])
def test_gradients_of_the_activations(tokens):
    weight, absmax = table(21, 13)
    x = activations(tokens, 13, dtype=torch.float32).requires_grad_()
    dense = unpack_table({"weight": weight, "row_absmax": absmax})
    upstream = activations(tokens, 21)
    (found,) = torch.autograd.grad((int8_linear(x, weight, absmax) * upstream).sum(), x)
    assert off(found, upstream @ dense) < 1e-6
    y = int8_linear(x, weight, absmax).square().sum()  # and again through it
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert off(second, (2 * dense.T @ dense).sum(0).expand_as(second)) < 1e-5


def test_what_torch_knows_of_the_operator():
    weight, absmax = table(21, 16)
    x = activations(2, 3, 16).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.arb_hf.int8_linear.default, (x, weight, absmax), test_utils=tests)


def test_fake_and_meta_tensors_have_the_shape():
    with FakeTensorMode():
        fake = int8_linear(torch.empty(2, 3, 16), torch.empty(21, 16, dtype=torch.int8), torch.empty(21).half())
        assert fake.shape == (2, 3, 21)
    x, weight, absmax = (each.to("meta") for each in (activations(2, 16), *table(21, 16)))
    assert int8_linear(x, weight, absmax).shape == (2, 21)


def test_compiled_it_is_one_graph():
    weight, absmax = table(21, 16)
    run = torch.compile(lambda x: int8_linear(x, weight, absmax) * 2, fullgraph=True, backend="aot_eager")
    x = activations(3, 16)
    assert torch.equal(run(x), int8_linear(x, weight, absmax) * 2)


def test_autocast_chooses_the_type_and_casts_no_scales():
    weight, absmax = table(21, 16)
    x = activations(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = int8_linear(x, weight, absmax)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, int8_linear(x.bfloat16(), weight, absmax))


def test_vmap_is_a_loop():
    weight, absmax = table(21, 16)
    x = activations(4, 3, 16)
    assert torch.allclose(torch.vmap(lambda each: int8_linear(each, weight, absmax))(x), int8_linear(x, weight, absmax))
    many = torch.stack([weight, -weight])
    both = torch.vmap(lambda codes: int8_linear(x, codes, absmax))(many)
    assert torch.equal(both[1], int8_linear(x, -weight, absmax))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, w, a: (x[:, :-1], w, a), "this layer takes floating-point ones"),
        (lambda x, w, a: (x.long(), w, a), "this layer takes floating-point ones"),
        (lambda x, w, a: (x, w, a[:-1]), r"row_absmax is \[20\] for 21 rows"),
        (lambda x, w, a: (x, w.float(), a), "a table is int8"),
        (lambda x, w, a: (x, w, a.float()), "a table is int8"),
        (lambda x, w, a: (x, w.to("meta"), a), "move them to one device"),
    ],
)
def test_wrong_arguments_are_named(change, error):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
        int8_linear(*change(activations(2, 16), *table(21, 16)))


def test_no_tokens_and_no_rows():
    weight, absmax = table(21, 16)
    assert int8_linear(torch.empty(0, 16), weight, absmax).shape == (0, 21)
    assert int8_linear(activations(2, 16), weight[:0], absmax[:0]).shape == (2, 0)
