"""The state around a call: whatever torch is told to do with a dense layer happens to a binary one, or is refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from arb_hf import native
from arb_hf.format.packing import unpack
from arb_hf.kernels import cpu, ops
from arb_hf.nn.linear import BinaryLinear
from arb_hf.nn.scaled import ScaledLinear
from helpers.process import TESTS, fresh_process
from helpers.weights import FORMS, activations, random_weight

IN, OUT = 96, 20
KERNELS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(native.library() is None, reason="no C library"))]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ops.VARIABLE, request.param)
    ops.kernel_for.cache_clear()
    yield request.param
    monkeypatch.undo()
    ops.kernel_for.cache_clear()


def pair(bias: bool = True) -> tuple[BinaryLinear, nn.Linear]:
    """A binary layer and the dense one that it stands for."""
    weight = random_weight((OUT, IN), 32, (2, 2, True))
    dense = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    dense.weight.copy_(weight.rounded().dequantize())
    return BinaryLinear.from_binary_weight(weight, dense.bias if bias else None), dense


def close(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of the lookup tables, and of half-precision results."""
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
    if expected.numel() and not expected.is_meta:
        assert (found.double() - expected.double()).norm() < 6e-3 * expected.double().norm()


class TestLikeTheDenseLayer:
    @pytest.mark.parametrize("tokens", [0, 3, cpu.TABLE_TOKENS + 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
    def test_autocast(self, kernel: str, tokens: int, dtype: torch.dtype, given: torch.dtype) -> None:
        layer, dense = pair()
        x = activations(tokens, IN).to(given).requires_grad_()
        other = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            found, expected = layer(x), dense(other)
            assert found.dtype == dtype
            with torch.no_grad():
                close(layer(x), dense(x))
        close(found, expected)
        found.float().square().sum().backward()
        expected.float().square().sum().backward()
        assert x.grad.dtype == given
        if tokens:
            assert (x.grad - other.grad).norm() < 2e-2 * other.grad.norm()

    def test_autocast_leaves_float64_alone(self, kernel: str) -> None:
        layer, dense = pair()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(layer(activations(3, IN).double()), dense.double().forward(activations(3, IN).double()).double())

    def test_gradients_do_not_see_autocast_around_backward(self, kernel: str) -> None:
        layer, _ = pair()
        scaled, x = ScaledLinear(layer), activations(3, IN).requires_grad_()
        wanted = [x, *scaled.steps.values()]
        expected = torch.autograd.grad(scaled(x).square().sum(), wanted)
        loss = scaled(x).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_inference_mode(self, kernel: str) -> None:
        layer, dense = pair()
        with torch.inference_mode():
            x = activations(3, IN)
            close(layer(x), dense(x))
            assert layer(x).is_inference()
        close(layer(x), dense(x))
        assert not layer(activations(3, IN)).is_inference()

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_jit_trace(self, kernel: str) -> None:
        layer, dense = pair()
        with torch.no_grad():
            traced = torch.jit.trace(layer, activations(3, IN))
        x = activations(3, IN, seed=5)
        close(traced(x), dense(x))

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, kernel: str, mode: str) -> None:
        layer, dense = pair()
        parameters, x = dict(layer.named_parameters()), activations(5, IN, seed=5)

        def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(layer, parameters, x)

        traced = make_fx(call, tracing_mode=mode)(parameters, activations(5, IN))
        assert "arb_hf.binary_linear" in str(traced.graph)
        close(traced(parameters, x), dense(x))

    def test_compiled_in_any_state(self, kernel: str) -> None:
        layer, dense = pair()
        compiled, x = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager"), activations(5, IN)
        for state in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
            with state:
                close(compiled(x), dense(x))

    def test_deterministic_algorithms(self, kernel: str) -> None:
        layer, _ = pair()
        scaled, x = ScaledLinear(layer), activations(3, IN).requires_grad_()
        wanted = [x, *scaled.steps.values()]
        expected = torch.autograd.grad(scaled(x).square().sum(), wanted)
        torch.use_deterministic_algorithms(True)
        try:
            found = torch.autograd.grad(scaled(x).square().sum(), wanted)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @pytest.mark.parametrize("tokens", [3, cpu.TABLE_TOKENS + 4])
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[:1].expand(x.shape),
            lambda x: x.repeat(1, 2)[:, ::2],
            lambda x: x.T.contiguous().T,
            lambda x: torch.complex(x, -x).conj().imag,
            lambda x: x[:, None, None].expand(-1, 2, 2, -1).to(memory_format=torch.channels_last),
            lambda x: nn.Parameter(x),
        ],
        ids=["expanded", "strided", "transposed", "negative", "channels_last", "parameter"],
    )
    def test_views(self, kernel: str, view: Callable[[Tensor], Tensor], tokens: int) -> None:
        layer, dense = pair()
        x = view(activations(tokens, IN))
        close(layer(x), dense(x))

    def test_subclasses_stay_what_they_are(self, kernel: str) -> None:
        class Marked(Tensor):
            pass

        layer, dense = pair()
        x = activations(3, IN).as_subclass(Marked)
        with torch.no_grad():
            assert type(layer(x)) is Marked
        close(layer(x).as_subclass(Tensor), dense(x).as_subclass(Tensor))

    def test_modes_see_the_operator(self, kernel: str) -> None:
        layer, _ = pair()
        x, seen = activations(3, IN), []

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(f"function {func}")
                return func(*args, **(kwargs or {}))

        class Dispatches(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(f"dispatch {func}")
                return func(*args, **(kwargs or {}))

        with torch.no_grad():
            for mode in (Functions(), Dispatches()):
                with mode:
                    layer(x)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                layer(x)
        assert [each.split()[0] for each in seen if "binary_linear" in each] == ["function", "dispatch"]
        assert any("arb_hf::binary_linear" in each.key for each in profile.key_averages())

    def test_saved_tensors_hooks(self, kernel: str) -> None:
        layer, _ = pair()
        scaled, x = ScaledLinear(layer), activations(3, IN)
        expected = torch.autograd.grad(scaled(x).square().sum(), list(scaled.steps.values()))
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: packed.append(each) or each.clone(), lambda it: it):
            out = scaled(x)
        found = torch.autograd.grad(out.square().sum(), list(scaled.steps.values()))
        assert packed and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class TestTransforms:
    """Derivatives of every order and direction, alone and one inside the other."""

    def test_of_the_activations(self, kernel: str) -> None:
        layer, dense = pair()
        x, t = activations(3, IN), activations(3, IN, seed=7)
        close(jvp(layer, (x,), (t,))[1], jvp(dense, (x,), (t,))[1])
        close(vjp(layer, x)[1](activations(3, OUT))[0], vjp(dense, x)[1](activations(3, OUT))[0])
        close(jacrev(layer)(x[0]), dense.weight)
        close(jacfwd(layer)(x[0]), dense.weight)
        for outer, inner in ((jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev)):
            found, expected = (outer(inner(lambda v, f=f: f(v).pow(3).sum()))(x[0]) for f in (layer, dense))
            close(found, expected)
        close(hessian(lambda v: layer(v).square().sum())(x[0]), 2 * dense.weight.T @ dense.weight)

    def test_dual_numbers(self, kernel: str) -> None:
        layer, dense = pair()
        x, t = activations(3, IN), activations(3, IN, seed=7)
        for state in (torch.enable_grad(), torch.no_grad()):
            with forward_ad.dual_level(), state:
                close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent, t @ dense.weight.T)

    def test_vmap(self, kernel: str) -> None:
        layer, dense = pair()
        x = activations(4, IN)
        with warnings.catch_warnings(action="error"):
            close(vmap(layer)(x), dense(x))
            close(vmap(layer, in_dims=1)(x.T), dense(x))
            close(vmap(vmap(layer))(x.view(2, 2, IN)), dense(x).view(2, 2, OUT))
            found, expected = (vmap(grad(lambda v, f=f: f(v).square().sum()))(x) for f in (layer, dense))
            close(found, expected)

    def test_a_batch_of_layers(self, kernel: str) -> None:
        layers = [BinaryLinear.from_binary_weight(random_weight((OUT, IN), 32, (2, 2, True))) for _ in range(3)]
        layers[1].row_parameters.mul_(2)
        x = activations(4, IN)
        stacked = stack_module_state(layers)
        found = vmap(lambda state: functional_call(layers[0], state, x))(stacked[0])
        close(found, torch.stack([layer(x) for layer in layers]))

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_of_the_scales(self, form: tuple[int, int, bool]) -> None:
        scaled = ScaledLinear(BinaryLinear.from_binary_weight(random_weight((OUT, IN), 32, form)))
        steps = {f"steps.{name}": step.detach().clone() for name, step in scaled.steps.items()}
        t = {name: activations(*step.shape, seed=number) / 10 for number, (name, step) in enumerate(steps.items())}
        x = activations(3, IN)

        def binary(steps: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(scaled, steps, (x,))

        def dense(steps: dict[str, Tensor], x: Tensor) -> Tensor:
            names = {name: name.removeprefix("steps.") for name in steps}
            packed = scaled.packed() | {names[name]: scaled._scale(names[name], steps[name]) for name in steps}
            return x @ unpack(packed, scaled._form).dequantize().T

        def loss(f: Callable, steps: dict[str, Tensor], x: Tensor) -> Tensor:
            return f(steps, x).square().sum()

        probes = (
            lambda f: jvp(f, (steps, x), (t, torch.ones_like(x)))[1],
            lambda f: grad(lambda s: loss(f, s, x))(steps),
            lambda f: jvp(grad(lambda s: loss(f, s, x)), (steps,), (t,))[1],
            lambda f: grad(lambda s: jvp(lambda r: loss(f, r, x), (s,), (t,))[1])(steps),
            lambda f: jvp(lambda s: jvp(lambda r: loss(f, r, x), (s,), (t,))[1], (steps,), (t,))[1],
            lambda f: grad(lambda v: sum(each.square().sum() for each in grad(loss, 1)(f, steps, v).values()))(x),
            lambda f: jacrev(lambda s: f(s, x))(steps),
        )
        for probe in probes:
            for found, expected in zip(
                *(torch.utils._pytree.tree_leaves(probe(f)) for f in (binary, dense)), strict=True
            ):
                close(found, expected)
        each = vmap(grad(loss, 1), in_dims=(None, None, 0))
        for name, found in grad(loss, 1)(binary, steps, x).items():
            close(each(binary, steps, x)[name].sum(0), found)


class TestFakeAndMeta:
    def test_shapes_without_values(self) -> None:
        layer, dense = pair(bias=False)
        x = activations(3, IN)
        meta = BinaryLinear(layer.form, device="meta")
        close(meta(x.to("meta")), dense(x).to("meta"))
        close(layer(x.to("meta")), dense(x).to("meta"))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert layer(torch.empty(3, IN)).shape == (3, OUT)
            fake = BinaryLinear(layer.form)
        for found in (fake(x), layer(mode.from_tensor(x))):
            assert type(found).__name__ == "FakeTensor" and found.shape == (3, OUT)

    def test_real_activations_of_a_layer_without_values_are_refused(self) -> None:
        layer, _ = pair()
        x = activations(3, IN)
        with pytest.raises(RuntimeError, match="activations are on cpu and weight is on meta"):
            BinaryLinear(layer.form, device="meta")(x)
        assert layer(x).isfinite().all()
        layer.row_parameters = nn.Parameter(layer.row_parameters.to("meta"), requires_grad=False)
        with pytest.raises(RuntimeError, match="activations are on cpu and row_parameters is on meta"):
            layer(x)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_activations_of_another_type_are_refused(self, kernel: str, dtype: torch.dtype, device: str) -> None:
        layer, _ = pair()
        for x in (torch.ones(3, IN, dtype=dtype, device=device), torch.ones(30, IN, dtype=dtype, device=device)):
            with pytest.raises(ValueError, match=rf"{dtype} \[\d+, {IN}\]; this layer takes floating-point"):
                layer(x)


@pytest.mark.skipif(native.library() is None, reason="no C library")
class TestShortcutOnlyForPlainCalls:
    def plain(self, layer: BinaryLinear, x: Tensor) -> bool:
        return layer._matmul.shortcut(x, layer._parameters) is not None

    def test_plain_calls(self) -> None:
        layer, _ = pair()
        x = activations(3, IN)
        assert self.plain(layer, x) and self.plain(layer, x.bfloat16())
        with torch.no_grad():
            assert self.plain(layer, nn.Parameter(x).data)
        with torch.inference_mode():
            assert self.plain(layer, x) and self.plain(layer, x.clone())
        assert self.plain(layer, x)

    @pytest.mark.parametrize(
        "state",
        [
            lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            lambda: torch.device("meta"),
            lambda: forward_ad.dual_level(),
            lambda: FakeTensorMode(),
            lambda: TorchFunctionMode(),
            lambda: TorchDispatchMode(),
            lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        ],
        ids=["autocast", "device", "dual", "fake", "function", "dispatch", "profiler"],
    )
    def test_not_in_another_state(self, state: Callable) -> None:
        layer, _ = pair()
        x = activations(3, IN)
        with state():
            assert not self.plain(layer, x)
        assert self.plain(layer, x)

    def test_not_in_a_transform(self) -> None:
        layer, _ = pair()
        x, taken = activations(3, IN), []
        for transform in (vmap, torch.func.functionalize, lambda f: lambda v: jvp(f, (v,), (v,))[0], jacrev):
            transform(lambda v: taken.append(self.plain(layer, x)) or v)(x)
        assert taken == [False] * 4

    def test_not_for_other_tensors(self) -> None:
        layer, _ = pair()
        x = activations(3, IN)
        negative = torch.complex(x, x).conj().imag
        for other in (negative, x.as_subclass(type("Sub", (Tensor,), {})), x.to("meta"), nn.Parameter(x)):
            assert not self.plain(layer, other)
        assert self.plain(layer, x)
        layer.row_parameters = nn.Parameter(torch._neg_view(layer.row_parameters), requires_grad=False)
        assert not self.plain(layer, x)

    def test_a_tensor_in_the_memory_of_another_is_seen(self) -> None:
        layer, _ = pair()
        x = activations(3, IN)
        assert self.plain(layer, x)
        layer.weight = nn.Parameter(layer.weight[:, : OUT // 2], requires_grad=False)
        assert not self.plain(layer, x)

    def test_it_knows_the_plain_state_wherever_it_is_imported(self) -> None:
        code = """
import torch
with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
    from arb_hf.kernels import plain
x = torch.ones(2)
print(plain.is_plain_call(x))
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(plain.is_plain_call(x))
"""
        assert fresh_process(code).stdout.split() == ["True", "False"]


class TestDefaults:
    CODE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from arb_hf.nn.linear import BinaryLinear
from arb_hf.nn.scaled import ScaledLinear
from helpers.weights import activations, random_weight
layer = BinaryLinear.from_binary_weight(random_weight((20, 96), 32, (2, 2, True)))
scaled, few, many = ScaledLinear(layer), activations(3, 96), activations(40, 96)
def results():
    found = []
    for x in (few, many):
        x = x.detach().requires_grad_()
        found += [layer(x.detach()), *torch.autograd.grad(scaled(x).square().sum(), [x, *scaled.steps.values()])]
    return found
expected = results()
def check(name):
    found = results()
    assert all(torch.equal(one, other) and one.device == other.device for one, other in zip(found, expected)), name
    assert torch.equal(layer.binary_weight().dequantize(), ScaledLinear(layer).binary.binary_weight().dequantize()), name
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    torch.set_default_dtype(dtype)
    check(dtype)
torch.set_default_dtype(torch.float32)
torch.set_default_device("meta")
check("meta")
print("same")
"""

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_default_device_and_dtype_change_nothing(self, kernel: str) -> None:
        """One process for all defaults: starting it takes longer than what it does."""
        done = fresh_process(self.CODE.format(tests=str(TESTS)), ARB_HF_KERNEL=kernel)
        assert done.stdout.strip() == "same", done.stderr


class TestThreads:
    @pytest.mark.parametrize("tokens", [2, cpu.TABLE_TOKENS + 4])
    def test_many_threads_in_one_layer(self, kernel: str, tokens: int) -> None:
        layer, _ = pair()
        inputs = [activations(tokens, IN, seed=seed) for seed in range(4)]
        expected = [layer(x) for x in inputs]
        before, wrong = torch.get_num_threads(), []

        def work(number: int) -> None:
            torch.set_num_threads(1 + number % 2)
            for _ in range(50):
                if not torch.allclose(layer(inputs[number]), expected[number], rtol=1e-5, atol=1e-5):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            torch.set_num_threads(before)
        assert not wrong
