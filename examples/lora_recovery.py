"""Win back quality of a packed model by a short fine-tune of LoRA adapters beside it, or of its own scales.

    python examples/lora_recovery.py ./model-arb-rc --steps 60 --out adapter
    python examples/lora_recovery.py ./model-arb-rc --scales --teacher ./model --out model-tuned

Trains on ``--train`` and measures on ``--text``, which must be another text. Adapters add to the model; with
``--scales`` it stays one packed model of the same bits. With ``--teacher`` it learns the original's predictions; without,
it learns the next tokens of the text, and may become better at this kind of text than the original is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf.evaluate import evaluation_windows, perplexity

DATA = Path(__file__).parent / "data"


def loss_of(model: torch.nn.Module, ids: torch.Tensor, teacher: torch.nn.Module | None) -> torch.Tensor:
    """Per token: the divergence from the teacher's predictions, or without one the negative log-likelihood."""
    if teacher is None:
        return model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    found = model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def train(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    windows: torch.Tensor,
    arguments: argparse.Namespace,
    teacher: torch.nn.Module | None,
) -> None:
    """Adam and a cosine from the rate to 0, on windows drawn with a seed of its own."""
    steps = 3 if arguments.quick else arguments.steps
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids = windows[torch.randint(len(windows), (arguments.batch,), generator=generator)]
        loss = loss_of(model, ids, teacher)
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
    parser.add_argument("model", help="packed model: folder, or name on the Hub")
    parser.add_argument("--train", default=str(DATA / "wikitext2.calibration.raw"), help="text to train on")
    parser.add_argument("--text", default=str(DATA / "wikitext2.heldout.raw"), help="text to measure perplexity on")
    parser.add_argument("--length", type=int, default=256, help="tokens per training window")
    parser.add_argument("--eval-length", type=int, default=512, help="tokens per window when measuring")
    parser.add_argument("--eval-windows", type=int, default=8, help="number of windows to measure")
    parser.add_argument("--steps", type=int, default=60, help="number of training steps")
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate at the start")
    parser.add_argument(
        "--scales", action="store_true", help="train the scales of the binary layers instead of adapters"
    )
    parser.add_argument("--teacher", help="the original model, to learn its predictions instead of the text")
    parser.add_argument("--out", help="folder to write: the adapter, or with --scales the model")
    parser.add_argument("--quick", action="store_true", help="three steps: a smoke test")
    arguments = parser.parse_args()

    model = arb_hf.from_pretrained(arguments.model, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    measured = evaluation_windows(tokenizer, arguments.text, arguments.eval_length, arguments.eval_windows)
    windows = evaluation_windows(tokenizer, arguments.train, arguments.length)
    before = perplexity(model, measured)
    print(f"perplexity before: {before:.2f}", flush=True)
    teacher = None
    if arguments.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
        print(f"perplexity of the teacher: {perplexity(teacher, measured):.2f}", flush=True)

    if arguments.scales:
        parameters = arb_hf.scales.unfreeze(model)
        train(model, parameters, windows, arguments, teacher)
        arb_hf.scales.freeze(model)
    else:
        model = arb_hf.lora.add_lora(model, r=arguments.rank, lora_alpha=2 * arguments.rank)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train(model, parameters, windows, arguments, teacher)
    print(f"perplexity after: {perplexity(model, measured):.2f} (before: {before:.2f})")

    if arguments.out:
        if arguments.scales:
            arb_hf.save_pretrained(model, tokenizer, arguments.out)
            print(f"written to {arguments.out}")
        else:
            model.save_pretrained(arguments.out)
            print(f"written to {arguments.out}; arb_hf.lora.load_lora(model, {arguments.out!r}) puts it on the model")


if __name__ == "__main__":
    main()
