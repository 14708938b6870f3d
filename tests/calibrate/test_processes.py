"""Several processes: the same layers on all, nearly the errors of one, one that dies ends the others."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from arb_hf import ArbCalibrationError
from arb_hf.binarize import BinarizeOptions, binarize_weight
from arb_hf.calibrate.hessians import InputGroup
from arb_hf.calibrate.processes import Processes, _described, _merged
from helpers import tiny
from helpers.process import environment

DIED = "another process of this run ended or stopped answering"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """What the scenes of ``helpers/ranks.py`` left: per scene and rank a model, its errors, stderr and exit status."""
    folder = tmp_path_factory.mktemp("scenes")
    command = [sys.executable, "-m", "helpers.ranks", str(folder)]
    variables = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def weights(scenes: Path, scene: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(scenes / scene / str(rank) / "model.safetensors")


def outcome(scenes: Path, scene: str, rank: int) -> tuple[int, str]:
    """Exit status and stderr."""
    folder = scenes / scene / str(rank)
    return int((folder / "status").read_text()), (folder / "stderr").read_text()


def test_two_processes_agree_to_the_bit_and_with_one_nearly(scenes):
    tiny.assert_equal(weights(scenes, "two", 0), weights(scenes, "two", 1))
    reports = [json.loads((scenes / "two" / str(rank) / "report.json").read_text()) for rank in range(2)]
    errors = [[each["output_error"] for each in report["matrices"]] for report in reports]
    assert errors[0] == errors[1]
    assert reports[0]["samples"] == 6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes has: the number of threads decides the last bits of a matmul
    try:
        single = [each.solve.output_error for each in tiny.binarize(scenes / "model").arb_report.matrices]
    finally:
        torch.set_num_threads(threads)
    per_layer = [
        [sum(each[layer * 7 : layer * 7 + 7]) / 7 for layer in range(tiny.LAYERS)] for each in (errors[0], single)
    ]
    assert per_layer[0] == pytest.approx(per_layer[1], rel=1e-3)


def test_two_processes_tune_alike(scenes):
    tiny.assert_equal(weights(scenes, "tuned", 0), weights(scenes, "tuned", 1))
    tuned = [json.loads((scenes / "tuned" / str(rank) / "report.json").read_text())["tuned"] for rank in range(2)]
    losses = [[(each["before"], each["after"]) for each in report] for report in tuned]
    assert losses[0] == losses[1]
    assert [each["steps"] for each in tuned[0]] == [4] * tiny.LAYERS


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_resume_works(scenes, victim):
    assert outcome(scenes, f"kill {victim}", victim)[0] == -signal.SIGKILL
    code, errors = outcome(scenes, f"kill {victim}", 1 - victim)
    assert code == 1
    assert DIED in errors
    assert "run the same command again" in errors
    for rank in range(2):
        tiny.assert_equal(weights(scenes, f"resume {victim}", rank), weights(scenes, "two", 0))
    assert (scenes / f"kill {victim}" / "stored").read_text() == "1"


def test_the_number_of_processes_belongs_to_the_run(scenes):
    code, errors = outcome(scenes, "one resumes two", 0)
    assert code == 1
    assert "machine: processes was 2, now 1" in errors


def test_an_error_on_one_process_is_told_by_all(scenes):
    assert [outcome(scenes, "broken", rank)[0] for rank in range(2)] == [1, 1]
    assert "process 1 of 2 failed: ArbCalibrationError: broken on purpose" in outcome(scenes, "broken", 0)[1]


def test_a_folder_in_use_is_refused_on_every_process(scenes):
    for rank in range(2):
        code, errors = outcome(scenes, "folder in use", rank)
        assert code == 1
        assert "another run works in checkpoint_dir" in errors


def test_sequences_are_shared_out():
    shares = [Processes(rank, 3).share(list(range(8))) for rank in range(3)]
    assert sorted(each for share in shares for each in share) == list(range(8))
    assert {len(share) for share in shares} == {2, 3}
    with pytest.raises(ArbCalibrationError, match="cannot be shared"):
        Processes(0, 3).share([1, 2])


def test_matrices_are_shared_by_cost():
    """A LLaMA layer on two processes: no process has more than six tenths of the work; all processes decide alike."""
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "gate": (22, 8), "up": (22, 8), "down": (8, 22)}
    with torch.device("meta"):
        linears = {name: nn.Linear(m * 64, n * 64, bias=False) for name, (n, m) in shapes.items()}
    groups = [InputGroup(names, 0, 0) for names in (["q", "k", "v"], ["o"], ["gate", "up"], ["down"])]
    owners = Processes(0, 2).owners(groups, linears)
    assert owners == Processes(1, 2).owners(groups, linears)
    work = [sum(linears[name].weight.numel() for name in owners if owners[name] == rank) for rank in range(2)]
    assert max(work) < 0.6 * sum(work)
    assert set(Processes().owners(groups, linears).values()) == {0}


def test_groups_that_only_some_processes_saw_are_merged():
    seen = [[["q", "k"], ["gate"], ["up"], ["rare"]], [["q", "k"], ["gate", "up"], ["rare"]]]
    assert _merged(seen) == [["q", "k"], ["gate", "up"], ["rare"]]


def test_weights_without_some_tensors_travel_too():
    weight = binarize_weight(
        torch.randn(8, 64), None, BinarizeOptions(block_size=32, group_bitmap=False, refinement="paper")
    )
    assert weight.groups is None
    received = Processes()._broadcast_weight(None, _described(weight), 0, torch.device("cpu"))
    assert received.form == weight.form
    assert received.groups is None
    assert received.signs.shape == weight.signs.shape
    assert torch.equal(
        Processes()._broadcast_weight(weight, _described(weight), 0, torch.device("cpu")).signs, weight.signs
    )


def test_one_process_needs_no_group():
    alone = Processes.join()
    assert alone == Processes(0, 1)
    assert alone.gather("x") == ["x"]
    assert alone.together(lambda: 3) == 3
