"""Recover quality of a packed model by a short fine-tune: LoRA adapters, and optionally its own scales.

    python examples/lora_recovery.py ./model-arb-rc --steps 60 --out adapter
    python examples/lora_recovery.py ./model-arb-rc --scales --out model-tuned

Trains on ``--train`` and measures on ``--text``, which must be another text. With ``--scales`` the packed model changes
too and is written with its adapter beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import arb_hf
import arb_hf.lora
from arb_hf.evaluate import evaluation_windows, perplexity

DATA = Path(__file__).parent / "data"


def train(model: torch.nn.Module, windows: torch.Tensor, steps: int, batch: int, rate: float) -> None:
    """Plain next-token training with Adam and a cosine from ``rate`` to 0, on windows drawn with a seed of its own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids = windows[torch.randint(len(windows), (batch,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(steps // 10, 1) == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="packed model: folder or name on the Hub")
    parser.add_argument("--train", default=str(DATA / "wikitext2.calibration.raw"), help="text to train on")
    parser.add_argument("--text", default=str(DATA / "wikitext2.heldout.raw"), help="text to measure perplexity on")
    parser.add_argument("--length", type=int, default=256, help="tokens per training window")
    parser.add_argument("--eval-length", type=int, default=512, help="tokens per window of the measurement")
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scales", action="store_true", help="train the scales of the binary layers too")
    parser.add_argument("--out", help="folder for the adapter (with --scales: and the model)")
    parser.add_argument("--quick", action="store_true", help="three steps")
    arguments = parser.parse_args()

    model = arb_hf.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.scales and model.config.quantization_config.scale_dtype == "int8":
        parser.error(
            f"--scales: {arguments.model} has int8 scales, which cannot be trained; binarize with float16 ones"
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    measured = evaluation_windows(tokenizer, arguments.text, arguments.eval_length, arguments.eval_windows)
    windows = evaluation_windows(tokenizer, arguments.train, arguments.length)
    before = perplexity(model, measured)
    print(f"perplexity before: {before:.2f}", flush=True)

    adapted = arb_hf.lora.add_lora(model, r=arguments.rank, lora_alpha=2 * arguments.rank)
    if arguments.scales:
        arb_hf.lora.unfreeze_scales(adapted)
    train(adapted, windows, 3 if arguments.quick else arguments.steps, arguments.batch, arguments.rate)
    if arguments.scales:
        arb_hf.lora.freeze_scales(adapted)
    print(f"perplexity after: {perplexity(adapted, measured):.2f} (before: {before:.2f})")

    if arguments.out:
        folder = Path(arguments.out)
        if arguments.scales:
            adapted.save_pretrained(folder / "adapter")
            arb_hf.save_pretrained(adapted.unload(), tokenizer, folder)
        else:
            adapted.save_pretrained(folder)
        print(f"written to {folder}")


if __name__ == "__main__":
    main()
