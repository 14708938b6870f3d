"""The Triton kernels: against the reference under the interpreter, and compiled ahead of time for GPUs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from helpers.process import environment

pytest.importorskip("triton")

INTERPRET = """
import torch
from arb_hf.kernels import reference, triton
from arb_hf.format.packing import pack
from helpers.weights import FORMS, activations, random_weight
torch.set_num_threads(1)
SCALES = {(33, 131, 64): "int8", (5, 33, 32): "bfloat16", (20, 300, 128): "float32", (40, 280, 256): "float16"}
for number, form in enumerate(FORMS):
    for seed, ((n, m, block), scales) in enumerate(SCALES.items()):
        if seed % 2 != number % 2:
            continue  # the interpreter is slow: two shapes a form
        weight = random_weight((n, m), block, form, scales, seed, most=(25, 1000, 0, 40)[seed])
        tensors = pack(weight)
        for tokens, dtype in ((2, torch.float32), (5, torch.float32), (6, torch.float16)):
            x, gradient = activations(tokens, m).to(dtype), activations(tokens, n).to(dtype)
            limits = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.1}
            torch.testing.assert_close(triton.linear(x, tensors, weight.form), reference.linear(x, tensors, weight.form), **limits)
            got = triton.linear_transposed(gradient, tensors, weight.form)
            torch.testing.assert_close(got, reference.linear_transposed(gradient, tensors, weight.form), **limits)
    empty = activations(0, weight.form.in_features)
    assert triton.linear(empty, tensors, weight.form).shape == (0, weight.form.out_features)
print("agreed")
"""

COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from arb_hf.kernels import triton as kernels

capability = int(sys.argv[1])
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for kernel in (kernels.vector_kernel, kernels.matrix_kernel, kernels.transposed_kernel):
    config = kernel.configs[0]
    constants = {"BLOCK": 128, "GROUPS": 2, "SALIENT_GROUPS": 2, "row_absmax": None, **config.kwargs}
    types = {"x": "*bf16", "y": "*fp32" if kernel is kernels.vector_kernel else "*bf16"}
    types |= dict.fromkeys(("order", "counts", "weight", "second_plane", "salient_groups"), "*i32")
    types |= dict.fromkeys(("row_parameters", "column_scales", "salient_column_scales"), "*fp16")
    names = kernel.fn.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As launched: addresses and sizes that are multiples of 16 let loads go by vectors.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in ("rows", "columns")}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel.fn, signature, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    print(kernel.fn.__name__, "SHAREDBYTES:%d" % built.metadata.shared, *[line.strip() for line in usage.splitlines() if "REG:" in line])
"""


def run(code: str, *arguments: str, **changes: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_agrees_with_the_reference_under_the_interpreter() -> None:
    assert "agreed" in run(INTERPRET, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    lines = run(COMPILE, str(capability), TRITON_INTERPRET="0").splitlines()
    assert [line.split()[0] for line in lines] == ["vector_kernel", "matrix_kernel", "transposed_kernel"]
    for line in lines:
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", line)[1]) for name in ("REG", "STACK", "LOCAL"))
        assert 16 <= registers <= 232, line
        assert stack == local == 0, line  # what does not fit the registers spills to these
        assert int(re.search(r"SHAREDBYTES:(\d+)", line)[1]) <= 48 * 1024, line
