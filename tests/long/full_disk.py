"""Fill the disk at every write of a run, of a save and of an export, and fail every read of the source.

    python tests/long/full_disk.py [--only run ...]

An operation is done once to count its writes below a folder. Then it is done again for each of them, in a child process in
which that write and all later ones fail with ENOSPC (`full_disk.c`, loaded before the C library). The child must end with an
error that says so. Afterwards there is room again, and everything must be as it was before, or go on from there to the same
result. Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

SOURCE = Path(__file__).with_suffix(".c")
CLEAR = ("No space left on device", "Input/output error")
OUTSIDE = tempfile.gettempdir()  # not below the folder that fills


def preload() -> None:
    """Start this program again with the library of `full_disk.c` in front."""
    library = Path(tempfile.mkdtemp(prefix="arb_hf-full-disk-")) / "full_disk.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="operations to try (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arb_hf-full-disk-") as folder:
        cases = prepare(Path(folder))
        for name in options.only or cases:
            print(f"{name}: {try_all(Path(folder), *cases[name])}", flush=True)


def prepare(home: Path) -> dict[str, tuple[Callable, Callable, Callable, str]]:
    """Operations by name, each with what comes before, what must hold after it failed, and the limit to set."""
    import torch
    from transformers.utils import logging

    import arb_hf
    from helpers import tiny
    from helpers.byte_model import byte_tokenizer, byte_tokens, save_byte_model

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    (home / "tmp").mkdir()
    tempfile.tempdir = str(home / "tmp")  # gguf writes there first
    dense, work, packed, old = home / "dense", home / "work", home / "packed", home / "old"
    save_byte_model(dense, hidden_size=64)
    options = {"dataset": byte_tokens(), "num_samples": 4}
    model, another = (tiny.binarize(dense, **options, seed=seed) for seed in (0, 1))
    arb_hf.save_pretrained(model, byte_tokenizer(), packed)
    arb_hf.save_pretrained(another, byte_tokenizer(), old)
    wanted, before = digests(packed)["model.safetensors"], digests(old)

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.unlink(missing_ok=True)  # a file, where it was one

    def copied() -> None:
        fresh()
        shutil.copytree(old, work)

    def run() -> None:
        tiny.binarize(dense, **options, checkpoint_dir=work).save_pretrained(home / "tmp" / "out")

    def resumed() -> None:
        run()
        assert digests(home / "tmp" / "out")["model.safetensors"] == wanted, "the resumed run gives other bits"

    def unchanged() -> None:
        assert digests(work) == before, "the model that was there is not what it was"

    def nothing() -> None:
        left = [path for path in work.rglob("*") if path.is_file()] if work.is_dir() else [work] * work.exists()
        assert not left, f"left behind: {left}"

    def gguf() -> None:
        arb_hf.export.export_gguf(arb_hf.from_pretrained(packed), byte_tokenizer(), work)

    return {
        "run": (functools.partial(tiny.binarize, dense, **options, checkpoint_dir=work), fresh, resumed, "writes"),
        "save over a model": (functools.partial(arb_hf.save_pretrained, model, byte_tokenizer(), work), copied, unchanged, "writes"),
        "save": (functools.partial(arb_hf.save_pretrained, model, byte_tokenizer(), work), fresh, nothing, "writes"),
        "export dense": (lambda: arb_hf.export.export_dense(arb_hf.from_pretrained(packed), None, work), fresh, nothing, "writes"),
        "export gguf": (gguf, fresh, nothing, "writes"),
        "source": (functools.partial(tiny.binarize, dense, **options, checkpoint_dir=work), fresh, resumed, "reads"),
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def try_all(home: Path, operation: Callable, before: Callable, after: Callable, kind: str) -> str:
    """Fail the operation at each of its writes or reads; the number of them, or the first that went wrong."""
    place = home / "dense" if kind == "reads" else home
    before()
    status, output = in_child(operation, kind, 10**9, place)
    count = int(output.rpartition("operations ")[2]) if status == 0 else sys.exit(output)
    for number in range(1, count + 1):
        before()
        status, output = in_child(operation, kind, number, place)
        if status != 3 or not any(text in output for text in CLEAR):
            sys.exit(f"operation {number} of {count} ended with {status}:\n{output}")
        try:
            after()
        except AssertionError as error:
            sys.exit(f"after operation {number} of {count} failed: {error}\n{output}")
    return f"{count} {kind}, each ended with a clear error and nothing lost"


def in_child(operation: Callable, kind: str, limit: int, place: Path) -> tuple[int, str]:
    """Do it in a forked child; 0 for success, 3 for an error that users are meant to see, and what it printed."""
    with tempfile.TemporaryFile(dir=OUTSIDE) as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
            (ctypes.c_char * 4096).in_dll(shim, "folder").value = os.fsencode(place)
            ctypes.c_long.in_dll(shim, f"limit_{kind}").value = limit
            status = 1
            try:
                operation()
                status = 0
            except (ValueError, OSError, RuntimeError) as error:
                print(f"{type(error).__name__}: {error}")
                status = 3
            except Exception:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    print(f"operations {ctypes.c_long.in_dll(shim, f'count_{kind}').value}", flush=True)
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read().decode(errors="replace")


if __name__ == "__main__":
    if "LD_PRELOAD" not in os.environ:
        preload()
    main()
