"""Resume after a crash: finished decoder layers on disk, and the identity of the run they belong to.

A checkpoint folder holds ``manifest.json`` (what the run is made of, see :func:`fingerprint`), ``lock``, and for every
finished decoder layer ``layer-NNNNN.safetensors`` with ``layer-NNNNN.json``; of a run with ``bits``, ``forms.json``; of one
that distills, ``distilled.safetensors`` with ``distilled.json``, where that has come to. Every file is written beside its
place, flushed to the disk and renamed; a layer is finished once its JSON, written last, names the hash of its tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import ArbConfig
from ..errors import ArbCalibrationError
from ..nn.offloaded import stored_tensors
from .batches import Batch

logger = logging.getLogger(__name__)
VERSION = 1
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each weight, in its fingerprint
# Options that say nothing about the result, or for which the tokens stand.
NOT_IDENTITY = ("checkpoint_dir", "dataset", "tokenizer", "modules")
VOLATILE = ("_name_or_path", "transformers_version", "quantization_config", "use_cache")
MAX_DIFFERENCES = 12
STOPS = ("SIGTERM", "SIGHUP")  # the latter when a terminal or a connection closes; Windows has none


class LayerStore:
    """The finished decoder layers in one checkpoint folder, which this process holds alone until :meth:`close`.

    Args:
        directory: made if missing.
        identity: :func:`fingerprint` of the run.

    Raises:
        ArbCalibrationError: another process works in the folder; it belongs to another run (the message names each
            difference); it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        with self._written("the folder"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.directory / "lock")
        try:
            self._claim(identity)
        except BaseException:
            self.close()
            raise

    def _claim(self, identity: dict[str, Any]) -> None:
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        manifest = self.directory / "manifest.json"
        if manifest.exists():
            found = differences(_read_json(manifest) or {}, identity)
            if found:
                listed = "\n  ".join(found[:MAX_DIFFERENCES] + ["..."] * (len(found) > MAX_DIFFERENCES))
                raise ArbCalibrationError(
                    f"checkpoint_dir {self.directory} belongs to a run that differs from this one:\n  {listed}\n"
                    "Resume with what it was started with, or choose another checkpoint_dir"
                )
        elif any(self.directory.glob("layer-*")):
            raise ArbCalibrationError(
                f"checkpoint_dir {self.directory} holds layers without a manifest; choose another"
            )
        else:
            with self._written("the manifest"):
                _write(manifest, json.dumps(identity, indent=1).encode())

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def finished(self) -> list[int]:
        """Indices of the layers that are stored, before their tensors are checked."""
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.directory.glob("layer-*.json"))

    def save(self, index: int, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Store one finished decoder layer: its tensors, and a JSON document about it.

        Raises:
            ArbCalibrationError: the disk is full or cannot be written; the layers stored before stay valid.
        """
        self._save(_layer(index), f"decoder layer {index}", tensors, document)

    def save_distilled(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """Store how far distilling has come, as :meth:`save` does a layer."""
        self._save("distilled", "the state of distilling", tensors, document)

    def _save(self, stem: str, what: str, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        header = {"run": self.run, "sha256": hashlib.sha256(data).hexdigest()}
        with self._written(f"{what} ({len(data) / 1e6:.1f} MB)"):
            _write(self.directory / f"{stem}.safetensors", data)
            _write(self.directory / f"{stem}.json", json.dumps(header | document, indent=1).encode())

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save` stored for a layer, or None if it is not there or damaged (then it is binarized again)."""
        return self._load(_layer(index), f"decoder layer {index} is damaged and is binarized again")

    def load_distilled(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What :meth:`save_distilled` stored last, or None if it is not there or damaged (then it begins again)."""
        return self._load("distilled", "the state of distilling is damaged; it begins again")

    def _load(self, stem: str, damaged: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        document = _read_json(self.directory / f"{stem}.json")
        if document is None:
            return None
        try:
            data = (self.directory / f"{stem}.safetensors").read_bytes()
            if document["run"] == self.run and document["sha256"] == hashlib.sha256(data).hexdigest():
                return safetensors.torch.load(data), document
        except (OSError, KeyError, SafetensorError):
            pass
        logger.warning("%s: %s", self.directory, damaged)
        return None

    def save_forms(self, forms: dict[str, Any]) -> None:
        """Store the forms that the run chose, as JSON.

        Raises:
            ArbCalibrationError: the disk is full or cannot be written.
        """
        with self._written("the chosen forms"):
            _write(self.directory / "forms.json", json.dumps({"run": self.run, "forms": forms}, indent=1).encode())

    def load_forms(self) -> dict[str, Any] | None:
        """What :meth:`save_forms` stored, or None if it is not there or damaged (then it is measured again)."""
        document = _read_json(self.directory / "forms.json") or {}
        forms = document.get("forms")
        return forms if document.get("run") == self.run and isinstance(forms, dict) else None

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArbCalibrationError(
                f"checkpoint_dir {self.directory}: {what} could not be written ({error.strerror or error}). "
                "Layers stored before are whole: repair or free the disk, then run the same command again to continue"
            ) from error


def _layer(index: int) -> str:
    return f"layer-{index:05d}"


def _locked(path: Path) -> Any:
    """Open a file locked for this process; the system releases it however the process ends."""
    import fcntl  # POSIX only, as far as resuming is concerned

    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ArbCalibrationError(
            f"another run works in checkpoint_dir {path.parent}; wait for it, or choose another folder"
        ) from None
    return file


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under another name, flushed, renamed, and the rename flushed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def fingerprint(
    model: PreTrainedModel,
    layers: tuple[str, nn.ModuleList],
    batches: Iterable[Batch],
    config: ArbConfig,
    skip: list[str],
    surroundings: dict[str, Any],
) -> dict[str, Any]:
    """What decides a run's result, bit for bit.

    The model's config, a sample of every weight (16 pieces of 4 KiB, so that 70 billion weights take seconds), the
    calibration tokens, the options, and ``surroundings``: versions, device, threads, processes.
    """
    prefix, modules = layers
    weights: dict[str, Any] = {}
    for name, read in stored_tensors(model):
        inside = name.startswith(prefix + ".")
        place = ".".join(name.split(".")[: prefix.count(".") + 2]) if inside else name
        digest = weights.setdefault(place, hashlib.sha256())
        tensor = read()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for piece in _sample(tensor):
            digest.update(piece)
    tokens = hashlib.sha256()
    for batch in batches:
        for part in (batch.input_ids, batch.attention_mask):
            tokens.update(b"none" if part is None else f"{list(part.shape)}".encode() + as_bytes(part))
    described = {
        "version": VERSION,
        "model": {key: value for key, value in model.config.to_dict().items() if key not in VOLATILE}
        | {"decoder layers": f"{prefix}: {len(modules)}", "attention": model.config._attn_implementation},
        "weights": {place: digest.hexdigest() for place, digest in weights.items()},
        "calibration tokens": tokens.hexdigest(),
        "options": {key: value for key, value in config.to_dict().items() if key not in NOT_IDENTITY},
        "kept modules": skip,
        **surroundings,
    }
    return json.loads(json.dumps(described, default=str))


def _sample(tensor: Tensor) -> Iterator[bytes]:
    """Evenly spread pieces of a tensor's bytes, first and last included."""
    flat = tensor.detach().reshape(-1)
    count = max(SAMPLE_BYTES // flat.element_size(), 1)
    last = max(flat.numel() - count, 0)
    for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
        yield as_bytes(flat[start : start + count])


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type and device."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def differences(stored: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per entry in which two fingerprints differ."""
    found = []
    for key in sorted(stored.keys() | now.keys()):
        before, after = stored.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}: ")
        elif before != after:
            digest = isinstance(before, str) and isinstance(after, str) and len(before) == len(after) == 64
            found.append(f"{prefix}{key} differ" if digest else f"{prefix}{key} was {before!r}, now {after!r}")
    return found


def kept_digests(layer: nn.Module, replaced: Iterable[str]) -> dict[str, str]:
    """Digest every tensor in a decoder layer's state dict, except those of modules to be ``replaced``."""
    replaced = tuple(f"{name}." for name in replaced)
    return {
        name: hashlib.blake2b(as_bytes(tensor), digest_size=16).hexdigest()
        for name, tensor in layer.state_dict().items()
        if not name.startswith(replaced)
    }


def changed_tensors(layer: nn.Module, digests: dict[str, str], packed: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors to store of a binarized decoder layer: its packed modules, and every other tensor that has changed."""
    now = kept_digests(layer, packed)
    tensors = {name: tensor for name, tensor in layer.state_dict().items() if now.get(name) != digests.get(name)}
    for name, module in packed.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors


@contextmanager
def explained_stops(how_to_resume: Callable[[], str]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does, and log how to resume when the run is stopped.

    A signal that is ignored, as ``nohup`` does with SIGHUP, stays so. The layer at work is abandoned; those that are stored
    are whole at any moment.
    """

    def terminate(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    previous = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        stops = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
        previous = {each: signal.signal(each, terminate) for each in stops if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    except BaseException as error:
        ended = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}.get(type(error), "ended by an error")
        logger.warning("binarizing was %s: %s", ended, how_to_resume())
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
