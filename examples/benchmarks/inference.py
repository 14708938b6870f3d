"""Speed of binary inference against torch's own matmuls: one linear, batches, all linears of a model, generation.

    python examples/benchmarks/inference.py --quick                       # a minute, no model
    python examples/benchmarks/inference.py --model DIR --json out.json --plot out.png
    python examples/benchmarks/inference.py --model DIR --gguf FILE --only generate   # llama.cpp too: llama-cpp-python

All contenders run in turn and medians are compared, so that other load on the machine affects them equally. With one
thread the time is the thread's CPU time, with more it is wall time. Weights are random, because speed does not depend on
quality.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from arb_hf import native
from arb_hf.format.form import BinaryForm
from arb_hf.format.packing import pack_mask
from arb_hf.format.table import pack_table, unpack_table
from arb_hf.kernels import binary_linear, int8_linear, reference
from arb_hf.nn.linear import BinaryLinear

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
SMOLLM2 = (
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
)  # a decoder layer of 30
GROUP = 128  # of torch's int4
PUBLISHED_SALIENT = 6  # of 128 columns: 4.5 %, what the published search settles on


def random_layer(
    n: int, m: int, seed: int = 0, salient: int = PUBLISHED_SALIENT, groups: int = 2, by_column: bool = True
) -> BinaryLinear:
    """A layer of the default form (arb-rc, both bitmaps, float16 scales) with random bits; ``salient`` columns a block."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(m, dtype=torch.bool)
    for start in range(0, m, 128):
        width = min(128, m - start)
        mask[start + torch.randperm(width, generator=generator)[: salient * width // 128]] = True
    layer = BinaryLinear(BinaryForm(n, m, int(mask.sum()), 128, groups, groups, by_column, "float16"))
    for parameter in layer.parameters():
        if parameter.dtype == torch.int32:
            parameter.data = torch.randint(-(2**31), 2**31, parameter.shape, generator=generator, dtype=torch.int64).to(
                torch.int32
            )
        elif parameter.is_floating_point():
            parameter.data = (torch.rand(parameter.shape, generator=generator) + 0.5).to(parameter.dtype)
    layer.salient_columns.data = pack_mask(mask)
    return layer


def int4(n: int, m: int) -> Callable[[Tensor], Tensor] | None:
    """torch's int4 linear, groups of 128, bfloat16; None where this torch has none."""
    try:
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, m), dtype=torch.int32), 1)
        scales = torch.rand(-(-m // GROUP), n, 2).to(torch.bfloat16)
        run = torch.ops.aten._weight_int4pack_mm_for_cpu
        run(torch.zeros(1, m, dtype=torch.bfloat16), codes, GROUP, scales)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return lambda x: run(x, codes, GROUP, scales)


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each: runs go round and round for about ``seconds``."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 6 or time.perf_counter() < end:
        for name, run in contenders.items():
            start = clock()
            run()
            if rounds:  # the first round warms up
                times[name].append(clock() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def matmul(n: int, m: int, tokens: int, seconds: float) -> dict:
    """One shape: binary against bf16, fp32 and int4, and its error against the fp32 reference."""
    layer, dense = random_layer(n, m), torch.randn(n, m)
    weight = {"bf16": dense.to(torch.bfloat16), "fp32": dense}
    x = {"bf16": torch.randn(tokens, m).to(torch.bfloat16)}
    x["fp32"] = x["bf16"].float()
    contenders: dict[str, Callable[[], object]] = {
        "binary": lambda: layer(x["bf16"]),
        "bf16": lambda: nn.functional.linear(x["bf16"], weight["bf16"]),
        "fp32": lambda: nn.functional.linear(x["fp32"], weight["fp32"]),
    }
    four_bits = int4(n, m) if tokens <= 64 else None
    if four_bits:
        contenders["int4"] = lambda: four_bits(x["bf16"])
    median = interleaved(contenders, seconds)
    few = x["fp32"][:4]
    expected = reference.linear(few, layer.packed, layer.form)
    size = sum(parameter.nbytes for parameter in layer.parameters())
    return {
        "shape": [n, m],
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "speed_against": {name: median[name] / median["binary"] for name in median if name != "binary"},
        "relative_error": ((layer(few) - expected).norm() / expected.norm()).item(),
        "bytes_per_second": size / median["binary"],
        "bits_per_weight": layer.form.bits_per_weight(),
    }


def bandwidth() -> float:
    """Bytes a second that one pass over memory larger than the caches reads, at the current number of threads."""
    block = torch.zeros(1 << 26, dtype=torch.float32)
    return block.nbytes / interleaved({"read": block.sum}, 1.0)["read"]


def all_linears(seconds: float, layers: int) -> dict:
    """All decoder linears of SmolLM2-135M (30 decoder layers), one token."""
    binary = [random_layer(n, m, seed) for seed in range(layers) for n, m in SMOLLM2]
    dense = [nn.Linear(m, n, bias=False, dtype=torch.bfloat16) for _ in range(layers) for n, m in SMOLLM2]
    full = [nn.Linear(m, n, bias=False) for _ in range(layers) for n, m in SMOLLM2]
    x = {m: torch.randn(1, 1, m).to(torch.bfloat16) for m in (576, 1536)}
    wide = {m: value.float() for m, value in x.items()}
    median = interleaved(
        {
            "binary": lambda: [layer(x[layer.in_features]) for layer in binary],
            "operator": lambda: [binary_linear(x[layer.in_features], layer.packed, layer.form) for layer in binary],
            "bf16": lambda: [layer(x[layer.in_features]) for layer in dense],
            "fp32": lambda: [layer(wide[layer.in_features]) for layer in full],
        },
        seconds,
    )
    speed = {name: median[name] / median["binary"] for name in ("bf16", "fp32", "operator")}
    return {"linears": len(binary), "threads": torch.get_num_threads(), "seconds": median, "speed_against": speed}


def head(seconds: float, rows: int = 49152, width: int = 576) -> list[dict]:
    """SmolLM2's head as int8 against the dense one, one token and a few, in each type."""
    table = pack_table(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)))
    weight, records = unpack_table(table), []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        dense = weight.to(dtype)
        for tokens in (1, 4, 16, 64):
            x = torch.randn(tokens, width).to(dtype)
            median = interleaved(
                {
                    "int8": partial(int8_linear, x, table["weight"], table["row_absmax"]),
                    "dense": partial(nn.functional.linear, x, dense),
                },
                seconds / 4,
            )
            size = {"rows": rows, "width": width, "tokens": tokens, "type": name, "threads": torch.get_num_threads()}
            records.append(size | {"seconds": median, "share": median["int8"] / median["dense"]})
    return records


def binary_copy(model: nn.Module) -> nn.Module:
    """The model with the linears of its decoder layers replaced by random binary ones."""
    model = copy.deepcopy(model)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            layer = random_layer(module.out_features, module.in_features)
            layer.row_parameters.data *= 0.02  # the size of a trained weight: activations stay finite
            model.model.layers.set_submodule(name, layer)
    return model


def generate(model: nn.Module, tokens: Tensor, count: int) -> None:
    """Exactly ``count`` tokens by transformers' ``generate``."""
    options: dict = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def llama_cpp(path: str, context: int) -> Callable[[Tensor, int], None]:
    """The same by llama.cpp, which reads ``path``, a GGUF file."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(path, n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(tokens: Tensor, count: int) -> None:
        model.reset()  # the prompt is to be read anew
        made = model.generate(tokens[0].tolist(), temp=0.0)
        for _ in range(count):
            next(made)

    return run


def generation(directory: str, gguf: str | None, prompt: int, new: int, rounds: int) -> dict:
    """Tokens a second of ``generate``: the prompt (all but one token of time is its forward), then one token at a time."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    contenders: dict[str, Callable[[Tensor, int], None]] = {
        "binary": partial(generate, binary_copy(dense)),
        "bf16": partial(generate, dense),
    }
    if gguf:
        contenders["llama.cpp"] = llama_cpp(gguf, prompt + new + 8)
    tokens = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(run: Callable[[Tensor, int], None], count: int) -> float:
        start = clock()
        run(tokens, count)
        return clock() - start

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            first, all_of_them = seconds(run, 1), seconds(run, 1 + new)
            if turn:
                times[name].append((first, all_of_them - first))
    result = {"model": directory, "prompt": prompt, "new": new, "threads": torch.get_num_threads()}
    for name, pairs in times.items():
        result[name] = {
            "prompt_tokens_per_second": prompt / statistics.median(first for first, _ in pairs),
            "decode_tokens_per_second": new / statistics.median(rest for _, rest in pairs),
        }
    for what in ("prompt", "decode"):
        key = f"{what}_tokens_per_second"
        for name in list(contenders)[1:]:
            result[f"{what}_speed_against_{name}"] = result["binary"][key] / result[name][key]
    return result


RESIDENT = """
import ctypes, gc, json, re, sys, tempfile, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from arb_hf import ArbConfig
torch.set_num_threads(1)
def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free is nobody's
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
ids = torch.arange(1, 65)[None]
def generate(model):
    options = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
# What the libraries themselves take is not the model's: first all of it once with a tiny one.
with tempfile.TemporaryDirectory() as tiny:
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tiny + "/dense")
    config = ArbConfig(dataset=ids, refinement="paper", iterations=1)
    AutoModelForCausalLM.from_pretrained(tiny + "/dense", quantization_config=config).save_pretrained(tiny + "/packed")
    generate(AutoModelForCausalLM.from_pretrained(tiny + "/packed", dtype=torch.bfloat16))
start = resident()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded = resident()
generate(model)
print(json.dumps([loaded - start, resident() - start]))
"""


def resident_memory(directory: str) -> dict:
    """What a packed model adds to a process's resident memory, over its file: loaded, and after generating (Linux)."""
    done = subprocess.run([sys.executable, "-c", RESIDENT, directory], check=True, capture_output=True, text=True)
    loaded, generated = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    return {"file": size, "loaded": loaded / size, "after_generating": generated / size}


def plot(records: list[dict], path: str) -> None:
    """Speed against bf16 by the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        n, m = record["shape"]
        lines.setdefault(f"{n} x {m}, {record['threads']} thread(s)", []).append(
            (record["tokens"], record["speed_against"]["bf16"])
        )
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speed against bf16 F.linear")
    axes.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def report(record: dict) -> None:
    shape = f"{record['shape'][0]} x {record['shape'][1]}"
    speeds = "  ".join(f"{name} {speed:5.2f}x" for name, speed in record["speed_against"].items())
    print(
        f"{shape:>13}, {record['tokens']:4} tokens, {record['threads']} thread(s): {record['seconds']['binary'] * 1e6:9.0f} us  against "
        f"{speeds}  error {record['relative_error']:.1e}  {record['bytes_per_second'] / 1e9:.1f} GB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter runs")
    parser.add_argument("--model", help="folder of a model for `generate`, for example SmolLM2-135M-Instruct")
    parser.add_argument("--gguf", help="GGUF file of that model, for llama.cpp's `generate` (needs llama-cpp-python)")
    parser.add_argument("--packed", help="folder of a packed model, to measure the memory it takes")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1], help="numbers of threads to try"
    )
    parser.add_argument("--only", choices=("matmul", "linears", "head", "generate"), help="run one part only")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plot", help="write a plot to this image (needs matplotlib)")
    options = parser.parse_args()
    seconds = 1.0 if options.quick else 4.0
    shapes, batches = (SHAPES[::2], (1, 256)) if options.quick else (SHAPES, BATCHES)
    library = native.ISAS[native.isa()] if native.library() else "none"
    figures: dict = {
        "torch": torch.__version__,
        "instruction_set": library,
        "matmul": [],
        "linears": [],
        "head": [],
        "generate": [],
    }
    print(f"torch {torch.__version__}, C library: {library}")
    for threads in dict.fromkeys([options.threads[0]] if options.quick else options.threads):
        torch.set_num_threads(threads)
        with torch.no_grad():
            if options.only in (None, "matmul"):
                figures["bandwidth"] = {**figures.get("bandwidth", {}), str(threads): bandwidth()}
                print(f"{threads} thread(s) read {figures['bandwidth'][str(threads)] / 1e9:.1f} GB/s")
                for n, m in shapes:
                    for tokens in batches if (n, m) == (4096, 4096) else (1,):
                        figures["matmul"].append(matmul(n, m, tokens, seconds))
                        report(figures["matmul"][-1])
            if options.only in (None, "linears"):
                figures["linears"].append(all_linears(seconds, 10 if options.quick else 30))
                last = figures["linears"][-1]
                speeds = "  ".join(f"{name} {speed:.2f}x" for name, speed in last["speed_against"].items())
                print(
                    f"{last['linears']} linears of SmolLM2-135M: {last['seconds']['binary'] * 1e3:.1f} ms  against {speeds}",
                    flush=True,
                )
            if options.only in (None, "head"):
                records = head(seconds)
                figures["head"].extend(records)
                for each in records:
                    print(
                        f"head {each['rows']} x {each['width']}, {each['type']}, {each['tokens']:2} tokens, {threads} thread(s): "
                        f"int8 {each['seconds']['int8'] * 1e3:.2f} ms, dense {each['seconds']['dense'] * 1e3:.2f} ms, "
                        f"{each['share']:.2f} of it",
                        flush=True,
                    )
            if options.model and options.only in (None, "generate"):
                figures["generate"].append(
                    generation(options.model, options.gguf, 64, *((16, 2) if options.quick else (64, 5)))
                )
                print(json.dumps(figures["generate"][-1], indent=2), flush=True)
    if options.packed:
        figures["resident"] = resident_memory(options.packed)
        print(
            f"resident memory over the file's {figures['resident']['file'] / 1e6:.1f} MB: "
            f"{figures['resident']['loaded']:.2f} x loaded, {figures['resident']['after_generating']:.2f} x after generating"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        plot(figures["matmul"], options.plot)


if __name__ == "__main__":
    main()
