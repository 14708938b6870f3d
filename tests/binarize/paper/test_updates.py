"""The C versions of the alternating updates agree with torch's, on every processor and with any number of threads."""

import pytest
import torch

from arb_hf import native
from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.binarize.paper import arb, arb_rc, compiled

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C library is not built")


def group(rows: int, columns: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator) * 0.05 + 0.01
    member = (torch.rand(rows, columns, generator=generator) < density).float()
    member[0] = 0
    member[:, 0] = 0
    return values, member


def torch_only(monkeypatch) -> None:
    monkeypatch.setattr(native, "usable", lambda values: False)


def difference(fit, other, member) -> float:
    expected = other.values() * member
    return (((fit.values() * member - expected).square().sum()) / expected.square().sum()).item()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "density"), [(300, 120, 0.9), (97, 64, 0.1), (1, 9, 0.8), (513, 7, 0.5)])
@pytest.mark.parametrize("method", [arb, arb_rc])
def test_fits_are_those_of_torch(monkeypatch, method, order, rows, columns, density):
    values, member = group(rows, columns, density)
    if rows == 1:
        member[0, 1:] = 1
    found = method.alternate(values, member, order, 15)
    torch_only(monkeypatch)
    expected = method.alternate(values, member, order, 15)
    assert difference(found, expected, member) <= 1e-9
    assert len(found.signs) == len(found.rows) == order
    for sign in found.signs:
        assert set(sign.unique().tolist()) <= {-1.0, 0.0, 1.0}
    if rows > 1:
        assert all(row[0] == 0 for row in found.rows)  # a row without members has no scale
        assert found.columns is None or all(column[0] == 0 for column in found.columns)


@pytest.mark.parametrize("method", [arb, arb_rc])
def test_fits_depend_on_neither_threads_nor_instruction_set(monkeypatch, method):
    values, member = group(5000, 40, 0.5)
    expected, threads = method.alternate(values, member, 2, 15), torch.get_num_threads()
    for isa in range(native.isa() + 1):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            try:
                found = method.alternate(values, member, 2, 15)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(found.values(), expected.values())


@pytest.mark.parametrize("method", ["arb-rc", "arb-x", "arb", "billm"])
@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
def test_whole_matrices_without_the_library_are_the_same(monkeypatch, method, metric):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(90, 200, generator=generator), torch.randn(500, 200, generator=generator)
    options = BinarizeOptions(method=method, salient_metric=metric, refinement="paper")
    found = binarize_weight(weight, inputs.T @ inputs, options)
    torch_only(monkeypatch)
    expected = binarize_weight(weight, inputs.T @ inputs, options)
    assert torch.equal(found.salient, expected.salient)
    error = (found.dequantize() - expected.dequantize()).square().sum() / expected.dequantize().square().sum()
    assert error <= 1e-10


def test_other_tensors_are_left_to_torch():
    assert native.usable(torch.zeros(2, 2))
    assert not native.usable(torch.zeros(2, 2, dtype=torch.float64))
    assert not native.usable(torch.zeros(2, 2, device="meta"))


def test_a_lack_of_memory_is_an_error(monkeypatch):
    class Library:
        def __getattr__(self, name):
            def fail(*arguments):
                return -1

            return fail

    monkeypatch.setattr(native, "require", Library)
    with pytest.raises(MemoryError, match="arb_split_errors"):
        compiled.split_errors(torch.zeros(4, 4), torch.zeros(3), 1)
