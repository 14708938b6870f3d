"""The operator: every implementation against the reference, and what torch expects of an operator."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arb_hf import native
from arb_hf.errors import ArbFormatError
from arb_hf.format.form import SCALE_DTYPES, SCALES
from arb_hf.format.packing import pack, unpack
from arb_hf.format.weight import BinaryWeight
from arb_hf.kernels import cpu, gradients, ops, reference
from arb_hf.nn.linear import BinaryLinear
from helpers.process import fresh_process
from helpers.weights import FORMS, SHAPES, activations, error, random_weight

needs_library = pytest.mark.skipif(native.library() is None, reason="the C library is not built")


@needs_library
@pytest.mark.parametrize("isa", native.ISAS)
class TestCpu:
    @pytest.fixture(autouse=True)
    def choose(self, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if native.ISAS.index(isa) > native.require().arb_cpu_isa():
            pytest.skip(f"this processor lacks {isa}")
        monkeypatch.setattr(native, "isa", lambda: native.ISAS.index(isa))

    @pytest.mark.parametrize("dtype", SCALE_DTYPES)
    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("most", [0, 25, 1000])
    def test_tables_match_the_reference(self, isa: str, form: tuple[int, int, bool], dtype: str, most: int) -> None:
        for seed, (n, m, block) in enumerate(SHAPES):
            weight = random_weight((n, m), block, form, dtype, seed, most)
            tensors, x = pack(weight), activations(3, m)
            result = cpu.linear(x, tensors, weight.form)
            # AVX2 tables have 13 bits, the others 15; the reference rounds nothing.
            assert error(result, reference.linear(x, tensors, weight.form), x, weight.rounded().dequantize()) < (
                1e-3 if isa == "avx2" else 2.5e-4
            )

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_tiles_are_the_dense_weight(
        self, isa: str, form: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cpu, "TILE_ROWS", 32)
        monkeypatch.setattr(cpu, "TABLE_TOKENS", 0)
        for seed, (n, m, block) in enumerate(SHAPES):
            for dtype in SCALE_DTYPES:
                weight = random_weight((n, m), block, form, dtype, seed)
                tensors = pack(weight)
                dense = cpu.linear(torch.eye(m), tensors, weight.form).T
                # The sum of a salient weight's two orders may cancel: the tolerance is that of its terms.
                torch.testing.assert_close(dense, unpack(tensors, weight.form).dequantize(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_transposed_matches_the_reference(self, isa: str, form: tuple[int, int, bool]) -> None:
        for seed, (n, m, block) in enumerate(SHAPES):
            weight = random_weight((n, m), block, form, seed=seed)
            tensors, gradient = pack(weight), activations(3, n)
            result = cpu.linear_transposed(gradient, tensors, weight.form)
            torch.testing.assert_close(
                result, reference.linear_transposed(gradient, tensors, weight.form), rtol=1e-4, atol=1e-5
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("tokens", [0, 1, 4, cpu.TABLE_TOKENS, cpu.TABLE_TOKENS + 1])
    def test_types_and_numbers_of_tokens(self, isa: str, dtype: torch.dtype, tokens: int) -> None:
        weight = random_weight((70, 300), 128, (2, 2, True))
        tensors, x = pack(weight), activations(tokens, 300).to(dtype)
        result = cpu.linear(x, tensors, weight.form)
        assert result.dtype == dtype and result.shape == (tokens, 70)
        expected = reference.linear(x.float(), tensors, weight.form)
        if tokens:
            limit = {torch.bfloat16: 8e-3, torch.float16: 2e-3}.get(dtype, 1e-3)
            assert error(result, expected, x, weight.rounded().dequantize()) < limit

    def test_the_same_bits_for_any_number_of_threads(self, isa: str) -> None:
        weight = random_weight((1000, 1100), 128, (2, 2, True))
        tensors, x = pack(weight), activations(2, 1100)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(cpu.linear(x, tensors, weight.form))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_activations_that_are_not_finite_stay_so(self, isa: str, bad: float) -> None:
        weight = random_weight((40, 300), 128, (2, 2, True))
        x = activations(2, 300)
        x[1, 200] = bad
        result = cpu.linear(x, pack(weight), weight.form)
        assert result[0].isfinite().all() and not result[1].isfinite().any()

    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
    def test_activations_of_any_size(self, isa: str, scale: float) -> None:
        weight = random_weight((40, 300), 128, (2, 2, True))
        tensors, x = pack(weight), activations(2, 300) * scale
        result, expected = cpu.linear(x, tensors, weight.form), reference.linear(x, tensors, weight.form)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-3 * expected.abs().max().item())

    @settings(max_examples=25, deadline=None)
    @given(
        n=st.integers(1, 80), m=st.integers(1, 400), block=st.integers(1, 6), form=st.sampled_from(FORMS),
        most=st.integers(0, 200), tokens=st.integers(1, 3), seed=st.integers(0, 2**31),
    )  # fmt: skip
    def test_any_shape(
        self, isa: str, n: int, m: int, block: int, form: tuple[int, int, bool], most: int, tokens: int, seed: int
    ) -> None:
        weight = random_weight((n, m), 32 * block, form, "float16", seed, most)
        tensors, x = pack(weight), activations(tokens, m, seed=seed)
        result = cpu.linear(x, tensors, weight.form)
        assert error(result, reference.linear(x, tensors, weight.form), x, weight.rounded().dequantize()) < 1e-3


@needs_library
class TestCpuErrors:
    def test_a_bitmap_with_other_salient_columns(self) -> None:
        weight = random_weight((16, 256), 128, (2, 2, True))
        tensors = pack(weight)
        for byte in (0, 255):
            tensors["salient_columns"] = torch.full_like(tensors["salient_columns"], byte)
            with pytest.raises(ArbFormatError, match="salient_columns"):
                cpu.linear(activations(1, 256), tensors, weight.form)
            with pytest.raises(ArbFormatError, match="salient_columns"):
                cpu.linear_transposed(activations(1, 16), tensors, weight.form)

    def test_a_tensor_of_another_shape(self) -> None:
        weight = random_weight((16, 256), 128, (2, 2, True))
        tensors = pack(weight)
        tensors["salient_groups"] = tensors["salient_groups"][:, :-1]
        with pytest.raises(ArbFormatError, match="salient_groups"):
            cpu.linear(activations(1, 256), tensors, weight.form)

    @pytest.mark.parametrize("shape", [(), (255,), (2, 257)])
    def test_activations_of_another_width(self, shape: tuple[int, ...]) -> None:
        layer = BinaryLinear.from_binary_weight(random_weight((16, 256), 128, (2, 2, True)))
        with pytest.raises(ValueError, match="256"):
            layer(torch.zeros(shape))


@needs_library
class TestShortcut:
    def layer(self) -> BinaryLinear:
        return BinaryLinear.from_binary_weight(random_weight((33, 300), 128, (2, 2, True)))

    def test_it_is_taken_and_agrees_with_the_operator(self) -> None:
        layer, x = self.layer(), activations(2, 3, 300)
        assert layer._matmul.shortcut(x, layer._parameters) is not None
        assert torch.equal(layer(x), ops.binary_linear(x, layer.packed, layer.form))

    def test_not_where_a_gradient_is_wanted(self) -> None:
        layer, x = self.layer(), activations(2, 300).requires_grad_()
        assert layer._matmul.shortcut(x, layer._parameters) is None
        with torch.no_grad():
            assert layer._matmul.shortcut(x, layer._parameters) is not None

    def test_new_tensors_are_seen(self) -> None:
        layer, other, x = (
            self.layer(),
            BinaryLinear.from_binary_weight(random_weight((33, 300), 128, (2, 2, True), seed=0)),
            activations(1, 300),
        )
        before = layer(x)
        other.row_parameters.mul_(2)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.row_parameters.data = layer.row_parameters.data / 2
        torch.testing.assert_close(layer(x), before)

    def test_a_layer_that_was_used_copies_and_pickles(self) -> None:
        layer, x = self.layer(), activations(1, 300)
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)

    def test_activations_that_are_not_contiguous(self) -> None:
        layer, x = self.layer(), activations(300, 4)
        assert torch.equal(layer(x.T), layer(x.T.contiguous()))
        assert torch.equal(layer(x.T[::2]), layer(x.T.contiguous()[::2]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as it first compiles
class TestOperator:
    def arguments(self, weight: BinaryWeight) -> tuple:
        return ops.arguments_of(pack(weight), weight.form)

    @pytest.mark.parametrize("form", [(1, 1, True), (2, 2, False)], ids=str)
    def test_torch_accepts_it(self, form: tuple[int, int, bool]) -> None:
        arguments = self.arguments(random_weight((20, 140), 64, form))
        for x in (activations(3, 140), activations(2, 3, 140).requires_grad_(), activations(0, 140)):
            torch.library.opcheck(torch.ops.arb_hf.binary_linear.default, (x, *arguments))

    def test_gradient_of_the_activations(self) -> None:
        weight = random_weight((20, 140), 64, (2, 2, True))
        layer, x = (
            BinaryLinear.from_binary_weight(weight, bias=activations(20)),
            activations(2, 5, 140).requires_grad_(),
        )
        upstream = activations(2, 5, 20)
        layer(x).backward(upstream)
        torch.testing.assert_close(x.grad, upstream @ weight.rounded().dequantize(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_gradients_of_the_scales(
        self, form: tuple[int, int, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those of the dense weight, which torch derives from its decoding."""
        monkeypatch.setattr(gradients, "TILE_ROWS", 32)
        for seed, (n, m, block) in enumerate(SHAPES):
            weight = random_weight((n, m), block, form, dtype, seed)
            tensors, x, upstream = pack(weight), activations(2, 3, m), activations(2, 3, n)
            scales = {
                name: tensors[name].to(torch.float32, copy=True).requires_grad_() for name in SCALES if name in tensors
            }
            in_float32 = replace(weight.form, scale_dtype="float32")
            (upstream * (x @ unpack(tensors | scales, in_float32).dequantize().T)).sum().backward()
            stored = {name: tensors[name].clone().requires_grad_() for name in scales}
            ops.binary_linear(x, tensors | stored, weight.form).backward(upstream)
            for name, scale in scales.items():
                found = stored[name].grad
                expected = torch.zeros_like(scale) if scale.grad is None else scale.grad
                assert found is not None and found.dtype == tensors[name].dtype
                tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-3}
                torch.testing.assert_close(found.float(), expected, **tolerance)

    def test_gradients_that_nobody_wants_cost_nothing(self) -> None:
        weight = random_weight((20, 140), 64, (2, 2, True), "float32")
        tensors = pack(weight)
        out = ops.binary_linear(activations(3, 140).requires_grad_(), tensors, weight.form)
        assert not any(each.shape == (3, 140) for each in out.grad_fn.saved_tensors if each is not None)
        tensors["column_scales"].requires_grad_()
        x = activations(3, 140)
        ops.binary_linear(x, tensors, weight.form).sum().backward()
        assert x.grad is None and tensors["row_parameters"].grad is None
        assert tensors["column_scales"].grad is not None

    @pytest.mark.parametrize("shape", [(300,), (3, 300), (2, 3, 300), (0, 300)])
    def test_leading_dimensions(self, shape: tuple[int, ...]) -> None:
        layer = BinaryLinear.from_binary_weight(random_weight((33, 300), 128, (2, 1, False)))
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 33)

    def test_compiles_to_one_graph(self) -> None:
        layer = BinaryLinear.from_binary_weight(random_weight((33, 300), 128, (2, 2, True)))
        compiled = torch.compile(lambda x: layer(torch.relu(x)) + 1, fullgraph=True, backend="aot_eager")
        for tokens in (1, 20):
            x = activations(tokens, 300)
            torch.testing.assert_close(compiled(x), layer(torch.relu(x)) + 1)

    def test_exports(self) -> None:
        layer = BinaryLinear.from_binary_weight(random_weight((33, 300), 128, (2, 2, True)))
        tokens = torch.export.Dim("tokens", min=2, max=64)
        program = torch.export.export(layer, (activations(4, 300),), dynamic_shapes=({0: tokens},))
        assert "arb_hf.binary_linear" in str(program.graph)
        x = activations(7, 300)
        torch.testing.assert_close(program.module()(x), layer(x))


class TestChoice:
    CODE = "from arb_hf.kernels import ops; print(ops.kernel_for('cpu').__name__)"

    @pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_library)])
    def test_the_variable_chooses(self, name: str) -> None:
        assert fresh_process(self.CODE, ARB_HF_KERNEL=name).stdout.strip() == f"arb_hf.kernels.{name}"

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("fastest", "it can be auto, cpu, triton, reference"),
            ("triton", "does not run on cpu: it runs on CUDA devices only"),
        ],
    )
    def test_what_is_not_there_is_an_error(self, value: str, message: str) -> None:
        done = fresh_process(self.CODE, ARB_HF_KERNEL=value, TRITON_INTERPRET="0")
        assert done.returncode != 0 and message in done.stderr

    def test_cpu_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ops.VARIABLE, "cpu")
        monkeypatch.setattr(native, "library", lambda: None)
        with pytest.raises(RuntimeError, match="pip install"):
            ops.kernel_for.__wrapped__("cpu")

    def test_a_slow_choice_is_said(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.delenv(ops.VARIABLE, raising=False)
        monkeypatch.setattr(native, "library", lambda: None)
        assert ops.kernel_for.__wrapped__("cpu") is reference
        assert "built without its C library" in caplog.text and "pip install --force-reinstall" in caplog.text
