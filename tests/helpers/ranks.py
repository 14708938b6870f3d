"""Scenes with several processes for ``test_processes.py``; usage: python -m helpers.ranks FOLDER.

Processes are forked from this one, which has imported everything and has a single thread, and find each other by the
environment variables that ``accelerate launch`` and ``torchrun`` set.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from arb_hf import ArbCalibrationError
from arb_hf.calibrate import layer, matrices
from arb_hf.calibrate import model as model_module
from helpers import tiny
from helpers.forks import finish, forked

FOLDER = Path(sys.argv[1])


def die(this: layer.Run, index: int, original: Callable = model_module.binarize_layer) -> list:
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(this, index)


def fail(*_: object) -> None:
    raise ArbCalibrationError("broken on purpose")


def play(
    scene: str,
    count: int = 2,
    checkpoint: str | None = None,
    victim: int | None = None,
    how: str = "",
    **options: object,
) -> None:
    """Run ``count`` processes; the victim has a function replaced. ``options``: of the run."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    variables = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def process(rank: int) -> None:
        folder = FOLDER / scene / str(rank)
        folder.mkdir(parents=True)
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.environ.update({name: str(value) for name, value in variables.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
        if rank == victim:
            setattr(*{"die": (model_module, "binarize_layer", die), "fail": (matrices, "binarize_group", fail)}[how])
        try:
            model = tiny.binarize(FOLDER / "model", checkpoint_dir=checkpoint and FOLDER / checkpoint, **options)
            save_file(model.state_dict(), folder / "model.safetensors")  # save_pretrained writes on the first rank only
            model.arb_report.to_json(folder / "report.json")
        except Exception:
            traceback.print_exc()
            raise

    children = [forked(lambda rank=rank: process(rank)) for rank in range(count)]
    for rank, child in enumerate(children):
        (FOLDER / scene / str(rank) / "status").write_text(str(finish(child)))
    if checkpoint is not None:
        stored = len(list((FOLDER / checkpoint).glob("layer-*.json")))
        (FOLDER / scene / "stored").write_text(str(stored))


def main() -> None:
    torch.set_num_threads(1)
    tiny.save_model(FOLDER / "model")
    play("two")
    play("tuned", refinement="full", tune_steps=4)
    for victim in range(2):
        play(f"kill {victim}", checkpoint=f"checkpoint {victim}", victim=victim, how="die")
        play(f"resume {victim}", checkpoint=f"checkpoint {victim}")
    play("one resumes two", count=1, checkpoint="checkpoint 0")
    play("broken", victim=1, how="fail")
    (FOLDER / "used").mkdir()
    with (FOLDER / "used" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        play("folder in use", checkpoint="used")


if __name__ == "__main__":
    main()
