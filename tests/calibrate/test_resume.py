"""Runs that are killed, interrupted, out of disk or disturbed: they resume to the same bits, or say what is wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from arb_hf import ArbCalibrationError
from arb_hf.calibrate import layer as layer_module
from arb_hf.calibrate import model as model_module
from arb_hf.calibrate import resume
from helpers import tiny
from helpers.models import token_samples
from helpers.process import TESTS, environment


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory):
    """What an uninterrupted run saves."""
    return tiny.saved(tiny.binarize(dense), tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    """The checkpoints of a whole run, and its report."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, tiny.binarize(dense, checkpoint_dir=folder).arb_report


class Stop(Exception):
    """Ends a run on purpose."""


def stop_after(monkeypatch, layers: int, error: BaseException | None = None) -> None:
    def binarize_layer(this, index, original=model_module.binarize_layer):
        if index == layers:
            raise error or Stop
        return original(this, index)

    monkeypatch.setattr(model_module, "binarize_layer", binarize_layer)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """Six kills here; ``python tests/long/kills.py FOLDER`` does twenty."""
    variables = environment(OMP_NUM_THREADS="1")
    command = [sys.executable, str(TESTS / "long" / "kills.py"), str(tmp_path), "--kills", "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal True") == 6


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_resumed_run_has_the_same_bits_and_report(dense, expected, finished, tmp_path, monkeypatch, layers):
    folder = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        stop_after(patch, layers)
        with pytest.raises(Stop):
            tiny.binarize(dense, checkpoint_dir=folder)
    solved = []

    def count(layer, linears, calls, index, *rest, original=layer_module.binarize_matrices, **named):
        solved.append(index)
        return original(layer, linears, calls, index, *rest, **named)

    monkeypatch.setattr(layer_module, "binarize_matrices", count)
    model = tiny.binarize(dense, checkpoint_dir=folder)
    assert solved == list(range(layers, tiny.LAYERS))
    tiny.assert_equal(tiny.saved(model, tmp_path / "saved"), expected)
    before, after = finished[1].to_dict(), model.arb_report.to_dict()
    for each in before["matrices"] + after["matrices"]:
        each.pop("seconds")
    assert after["matrices"] == before["matrices"]
    assert not any(
        parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("_proj.weight")
    )


def test_other_tensors_that_changed_are_stored_and_restored(dense, tmp_path, monkeypatch):
    """A step that also changes a norm leaves its trace in the checkpoint; what did not change is not stored."""

    def change_a_norm(layer, *rest, original=layer_module.binarize_matrices, **named):
        results = original(layer, *rest, **named)
        layer.input_layernorm.weight.add_(0.25)
        return results

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "binarize_matrices", change_a_norm)
        changed = tiny.binarize(dense, checkpoint_dir=tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "layer-00001.safetensors")
    assert "input_layernorm.weight" in stored
    assert "post_attention_layernorm.weight" not in stored
    resumed = tiny.binarize(dense, checkpoint_dir=tmp_path / "checkpoint")
    tiny.assert_equal(tiny.saved(resumed, tmp_path / "a"), tiny.saved(changed, tmp_path / "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7}, "options: seed was 0, now 7"),
        ({"iterations": 3}, "options: iterations was 2, now 3"),
        ({"dataset": token_samples(6, 24, seed=1)}, "calibration tokens differ"),
        ({"batch_size": 2}, "options: batch_size was 1, now 2"),
        ({"modules_to_not_convert": ["q_proj"]}, "kept modules was"),
    ],
)
def test_another_run_is_refused_with_what_differs(dense, finished, options, message):
    with pytest.raises(ArbCalibrationError, match=message):
        tiny.binarize(dense, checkpoint_dir=finished[0], **options)


def test_another_model_or_version_is_refused(dense, finished, tmp_path, monkeypatch):
    for file in dense.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(
        path for path in tmp_path.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ArbCalibrationError, match=r"weights: model\.layers\.1 differ"):
        tiny.binarize(tmp_path, checkpoint_dir=finished[0])
    monkeypatch.setattr(model_module, "_versions", lambda: {"torch": "0"})
    with pytest.raises(ArbCalibrationError, match=r"versions: torch was .*, now '0'"):
        tiny.binarize(dense, checkpoint_dir=finished[0])


def test_threads_decide_bits_so_they_are_compared(dense, finished):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with pytest.raises(ArbCalibrationError, match=f"machine: threads was {before}, now {before + 1}"):
            tiny.binarize(dense, checkpoint_dir=finished[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "damage", ["truncated tensors", "flipped bit", "truncated json", "another run's", "no tensors"]
)
def test_a_damaged_layer_is_binarized_again(dense, expected, finished, tmp_path, caplog, damage):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in finished[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors, document = folder / "layer-00001.safetensors", folder / "layer-00001.json"
    data = bytearray(tensors.read_bytes())
    if damage == "truncated tensors":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "flipped bit":
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncated json":
        document.write_bytes(document.read_bytes()[:100])
    elif damage == "another run's":
        document.write_text(json.dumps(json.loads(document.read_text()) | {"run": "x"}))
    else:
        tensors.unlink()
    model = tiny.binarize(dense, checkpoint_dir=folder)
    if damage != "truncated json":
        assert "decoder layer 1 is damaged and is binarized again" in caplog.text
    tiny.assert_equal(tiny.saved(model, tmp_path / "saved"), expected)


def test_a_full_disk_is_said_and_resumed_from(dense, expected, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"

    def write(path, data, original=resume._write):
        if path.name == "layer-00001.safetensors":
            path.with_name(path.name + ".tmp").write_bytes(data[:99])  # as far as the room went
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "_write", write)
        with pytest.raises(ArbCalibrationError, match=r"decoder layer 1 .*No space left.*run the same command again"):
            tiny.binarize(dense, checkpoint_dir=folder)
    assert (folder / "layer-00000.json").exists()
    model = tiny.binarize(dense, checkpoint_dir=folder)
    assert not list(folder.glob("*.tmp"))
    tiny.assert_equal(tiny.saved(model, tmp_path / "saved"), expected)


def test_a_second_run_in_the_folder_is_refused(dense, tmp_path, monkeypatch):
    refused = []

    def binarize_layer(this, index, original=model_module.binarize_layer):
        if index == 1:
            with pytest.raises(ArbCalibrationError, match="another run works in checkpoint_dir") as error:
                tiny.binarize(dense, checkpoint_dir=tmp_path)
            refused.append(error)
        return original(this, index)

    monkeypatch.setattr(model_module, "binarize_layer", binarize_layer)
    tiny.binarize(dense, checkpoint_dir=tmp_path)
    assert len(refused) == 1


def test_layers_without_a_manifest_are_refused(dense, tmp_path):
    (tmp_path / "layer-00000.json").write_text("{}")
    with pytest.raises(ArbCalibrationError, match="without a manifest"):
        tiny.binarize(dense, checkpoint_dir=tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(dense, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArbCalibrationError, match="could not be written"):
        tiny.binarize(dense, checkpoint_dir=tmp_path / "file" / "folder")


def test_ctrl_c_says_how_to_resume(dense, tmp_path, monkeypatch, caplog):
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        tiny.binarize(dense, checkpoint_dir=tmp_path)
    assert f"interrupted: 2 of 3 decoder layers are kept in {tmp_path}; run the same command again" in caplog.text


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_says_how_to_resume_and_handlers_come_back(dense, tmp_path, monkeypatch, caplog, stop):
    def binarize_layer(this, index, original=model_module.binarize_layer):
        if index == 1:
            os.kill(os.getpid(), stop)
            time.sleep(10)
        return original(this, index)

    monkeypatch.setattr(model_module, "binarize_layer", binarize_layer)
    before = signal.signal(stop, signal.SIG_DFL)  # these tests may run under nohup, which ignores SIGHUP
    try:
        with pytest.raises(SystemExit) as error:
            tiny.binarize(dense, checkpoint_dir=tmp_path)
        assert signal.getsignal(stop) is signal.SIG_DFL
    finally:
        signal.signal(stop, before)
    assert error.value.code == 128 + stop
    assert "terminated: 1 of 3 decoder layers are kept" in caplog.text


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with resume.explained_stops(lambda: "unused"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_folder_nothing_is_promised(dense, monkeypatch, caplog):
    stop_after(monkeypatch, 1)
    with pytest.raises(Stop):
        tiny.binarize(dense)
    assert "nothing is kept without checkpoint_dir" in caplog.text


def test_fingerprint_differences_are_named():
    stored = {"a": 1, "b": {"c": "x" * 64, "d": 2}, "gone": 3}
    now = {"a": 1, "b": {"c": "y" * 64, "d": 4}, "new": 5}
    assert resume.differences(stored, now) == [
        "b: c differ",
        "b: d was 2, now 4",
        "gone was 3, now None",
        "new was None, now 5",
    ]
