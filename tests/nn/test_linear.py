"""`BinaryLinear` over the reference operator: every form, dtype and leading shape, gradients, the operator's contract."""

import itertools

import pytest
import torch
from torch import nn

from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.kernels import ops
from arb_hf.nn import BinaryLinear

FORMS = [
    BinarizeOptions(
        method,
        group_bitmap=groups,
        column_group_bitmap=columns,
        refinement="paper",
        iterations=2,
        scale_dtype=dtype,
    )
    for method, (groups, columns), dtype in itertools.product(
        ("arb-rc", "arb-x"), ((True, True), (True, False), (False, False)), ("float16", "int8")
    )
]


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch):
    """What the module promises, over the reference; tests/kernel holds the other kernels to it."""
    monkeypatch.setenv("ARB_HF_KERNEL", "reference")
    ops.kernel_for.cache_clear()
    yield
    monkeypatch.undo()
    ops.kernel_for.cache_clear()


def layer_and_weight(options: BinarizeOptions, n: int = 37, m: int = 200, bias: bool = False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, m, generator=generator)
    binary = binarize_weight(weight, None, options)
    extra = torch.randn(n, generator=generator) if bias else None
    return BinaryLinear.from_binary_weight(binary, extra), binary.rounded().dequantize(), extra


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_dense_layer(options, bias):
    layer, weight, extra = layer_and_weight(options, bias=bias)
    x = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, extra), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200,), (0, 200), (1, 200), (2, 3, 4, 200)])
def test_any_dtype_and_leading_shape(dtype, shape):
    layer, weight, _ = layer_and_weight(FORMS[0])
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (*shape[:-1], 37)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        out.float(), nn.functional.linear(x.float(), weight), rtol=tolerance, atol=tolerance * 10
    )


def test_non_contiguous_input():
    layer, weight, _ = layer_and_weight(FORMS[0])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).T
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradient_flows_to_the_activations(options):
    layer, weight, _ = layer_and_weight(options)
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1), requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * (x.detach() @ weight.T) @ weight
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("options", FORMS[:6:2], ids=str)
def test_operator_keeps_torchs_contract(options):
    layer, _, _ = layer_and_weight(options)
    x = torch.randn(3, 200, requires_grad=True)
    torch.library.opcheck(torch.ops.arb_hf.binary_linear, (x, *ops.arguments_of(layer.packed, layer.form)))


def test_state_dict_is_the_format_and_differs_from_a_dense_one():
    layer, _, _ = layer_and_weight(FORMS[0], bias=True)
    state = layer.state_dict()
    assert set(state) == {*layer.form.tensors(), "bias"}
    assert state["weight"].dtype == torch.int32
    assert state["weight"].shape != (37, 200)
    again = BinaryLinear(layer.form, bias=True)
    again.load_state_dict(state)
    x = torch.randn(2, 200)
    assert torch.equal(again(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(200, 37).load_state_dict({"weight": state["weight"], "bias": state["bias"]})


def test_binary_weight_comes_back():
    layer, weight, _ = layer_and_weight(FORMS[0])
    assert torch.equal(layer.binary_weight().dequantize(), weight)
    assert f"{layer.form.bits_per_weight():.2f} bits" in repr(layer)


def test_casting_a_model_leaves_stored_scales_alone():
    layer, _, _ = layer_and_weight(FORMS[0], bias=True)
    before = {name: tensor.clone() for name, tensor in layer.packed.items()}
    for moved in (nn.Sequential(layer).to(torch.bfloat16)[0], layer.half(), layer.double()):
        assert all(torch.equal(tensor, before[name]) for name, tensor in moved.packed.items())
        assert {name: t.dtype for name, t in moved.packed.items()} == {name: t.dtype for name, t in before.items()}
    assert layer.bias.dtype == torch.float64
    assert layer.to("meta").row_parameters.dtype == torch.float16
