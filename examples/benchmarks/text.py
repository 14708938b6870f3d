"""Time and memory of reading text: calibration windows of a file of any size and of an endless stream.

    python examples/benchmarks/text.py [--quick]

Prints a Markdown table. Each row is measured in a process of its own: seconds, and how far the peak of its memory lies
above what it held before it read, with a byte-level BPE tokenizer trained on the spot. The texts repeat WikiText-2's.
The last row tokenizes a text as one string, which is what reading cost in earlier versions, for any number of windows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from arb_hf import ArbConfig
from arb_hf.calibrate.batches import load_batches
from arb_hf.evaluate import evaluation_windows
from arb_hf.text import read_text, tokenize

SOURCE = Path(__file__).parent.parent / "data" / "wikitext2.calibration.raw"
VOCABULARY = 8192
TASKS = (
    "calibration, .txt",
    "calibration, .jsonl",
    "calibration, endless generator",
    "20 windows of perplexity, .txt",
    "one string",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(SOURCE)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def rows() -> Iterator[dict[str, str]]:
    """WikiText's paragraphs for ever."""
    paragraphs = [line for line in SOURCE.read_text(encoding="utf-8").split("\n") if line.strip()]
    while True:
        yield from ({"text": paragraph} for paragraph in paragraphs)


def write(folder: Path, characters: int) -> dict[str, Path]:
    """The text as files of that many characters, the one for a single string of at most 48 million."""
    files = {"txt": folder / "long.txt", "jsonl": folder / "long.jsonl", "one": folder / "one.txt"}
    for name, limit in (("txt", characters), ("jsonl", characters), ("one", min(characters // 3, 48_000_000))):
        written = 0
        with files[name].open("w", encoding="utf-8") as file:
            for row in rows():
                written += file.write(json.dumps(row) + "\n" if name == "jsonl" else row["text"] + "\n\n")
                if written >= limit:
                    break
    return files


def measure(task: str, folder: Path, samples: int, length: int) -> None:
    """Do one task and print megabytes and seconds as JSON."""
    tokenizer = make_tokenizer()
    data: dict[str, Any] = {TASKS[0]: folder / "long.txt", TASKS[1]: folder / "long.jsonl", TASKS[2]: rows()}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if task in data:
        config = ArbConfig(dataset=data[task], num_samples=samples, sequence_length=length)
        load_batches(config, lambda: tokenizer, VOCABULARY, None)
    elif task == TASKS[3]:
        evaluation_windows(tokenizer, folder / "long.txt", length, 20)
    else:
        tokenize(read_text(folder / "one.txt"), tokenizer)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"megabytes": peak / 1e3, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, default=1_000_000_000, help="length of the long texts")
    parser.add_argument("--quick", action="store_true", help="three million characters and a few short windows")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    characters, samples, length = (3_000_000, 4, 64) if arguments.quick else (arguments.characters, 128, 2048)
    if arguments.task:
        measure(arguments.task, Path(arguments.folder), samples, length)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), characters)
        sizes = [files["txt"], files["jsonl"], None, files["txt"], files["one"]]
        print(
            f"{samples} windows of {length} tokens\n\n| task | text, MB | memory, MB | seconds |\n|---|---|---|---|",
            flush=True,
        )
        for task, file in zip(TASKS, sizes, strict=True):
            command = [
                sys.executable,
                __file__,
                "--task",
                task,
                "--folder",
                folder,
                *(["--quick"] if arguments.quick else []),
            ]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            size = "-" if file is None else f"{file.stat().st_size / 1e6:.0f}"
            print(f"| {task} | {size} | {found['megabytes']:.0f} | {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
