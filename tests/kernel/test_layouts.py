"""The C kernels agree with the reference on any shape, stride and type; ``make asan`` drives them longer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf import kernels, native
from arb_hf.format.form import SCALE_DTYPES
from arb_hf.format.packing import pack
from arb_hf.kernels import cpu, reference
from helpers.weights import FORMS, activations, error, random_weight

LAYOUTS = ("plain", "transposed", "every second", "reversed storage", "expanded", "three dimensions")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers (one row of them for ``expanded``) with other strides."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every second":
        return torch.stack([x, x], -1).flatten(1)[:, ::2]
    if layout == "reversed storage":
        return torch.cat([x, x])[len(x) :]
    if layout == "expanded":
        return x[:1].expand(len(x), -1)
    return x[None] if layout == "three dimensions" else x


@pytest.mark.skipif(native.library() is None, reason="the C library is not built")
@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(1, 70), m=st.integers(1, 300), block=st.integers(1, 5), form=st.sampled_from(FORMS),
    most=st.integers(0, 60), scales=st.sampled_from(sorted(SCALE_DTYPES)),
    tokens=st.sampled_from([1, 2, 5, 16, 17, 20]), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=st.sampled_from(LAYOUTS), strided=st.booleans(), isa=st.integers(0, 2),
)  # fmt: skip
def test_kernels_agree_on_any_shape_stride_and_type(
    n, m, block, form, most, scales, tokens, seed, dtype, layout, strided, isa
):
    weight = random_weight((n, m), 32 * block, form, scales, seed, most)
    tensors = pack(weight)
    if strided:  # as slices of larger tensors, which is how tensor parallelism cuts them
        tensors = {name: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] for name, tensor in tensors.items()}
    x, gradient = (laid_out(activations(tokens, size, seed=seed).to(dtype), layout) for size in (m, n))
    dense = weight.rounded().dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "isa", lambda: min(isa, native.require().arb_cpu_isa()))
        for kernel, operand, matrix in (
            (cpu.linear, x, dense),
            (cpu.linear_transposed, gradient.reshape(tokens, n), dense.T),
        ):
            expected = getattr(reference, kernel.__name__)(operand.reshape(tokens, -1).float(), tensors, weight.form)
            result = kernel(operand, tensors, weight.form)
            assert result.dtype == dtype and result.shape == (*operand.shape[:-1], matrix.shape[0])
            limit = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}.get(dtype, 1e-3)
            assert error(result.reshape(tokens, -1), expected, operand.reshape(tokens, -1), matrix) < limit
        assert torch.equal(kernels.binary_linear(x, tensors, weight.form), cpu.linear(x, tensors, weight.form))
