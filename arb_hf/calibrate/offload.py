"""Where weights are: mapped or offloaded until their decoder layer's turn, over the user's devices once packed.

A model that is binarized on the fly is loaded to the CPU, not where ``device_map`` says: there its weights stay views of
the memory-mapped checkpoint (as long as the dtype is the checkpoint's) and cost no memory of their own. What an
explicit map sends to ``"disk"`` stays with accelerate until it is fetched, for loads that must convert weights. The map
itself is used once the model is packed, for the packed sizes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import logging
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from ..errors import ArbCalibrationError
from ..nn import BinaryLinear, int8_tables
from ..nn.int8 import Int8Table
from ..nn.offloaded import fetch, fetch_all, is_offloaded, offload_hooks
from ..nn.tables import ties_of

logger = logging.getLogger(__name__)
HOST = ("cpu", "disk")
# From these releases on, one offloaded tensor of a model with tied weights is not taken for another.
SOUND_TIES = ("accelerate", "1.15")
SOUND_TIED_TABLES = ("transformers", "5.18")


@dataclass
class Placement:
    """Where the user wants the packed model.

    Attributes:
        device_map: as given to ``from_pretrained``: a map, the name of a strategy (``"auto"``, ...), or None.
        max_memory: bytes per device for a strategy, noted while transformers sizes the model.
    """

    device_map: dict[str, Any] | str | None = None
    max_memory: dict[Any, Any] | None = None

    def loading_map(self) -> dict[str, Any] | str | None:
        """The map to load the full-precision model with: the CPU, and the disk where the user asks for it.

        A strategy is returned as it is, so that transformers finds out ``max_memory``; :meth:`note_memory` then
        leaves it no device but the CPU.
        """
        if not isinstance(self.device_map, dict):
            return self.device_map
        if "disk" not in self.device_map.values():
            return {"": "cpu"}
        return {name: "disk" if device == "disk" else "cpu" for name, device in self.device_map.items()}

    def note_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Keep the devices' memory for the packed model and offer the loader only the CPU's, without limit."""
        self.max_memory = max_memory
        return {"cpu": sys.maxsize}

    def execution_device(self) -> torch.device:
        """Where decoder layers are binarized: the first accelerator named by the user or found, or the CPU."""
        if isinstance(self.device_map, dict):
            devices = list(self.device_map.values())
        else:
            devices = [device for device, size in (self.max_memory or {}).items() if size]
        return next((_device(device) for device in devices if str(device) not in HOST), torch.device("cpu"))

    def dispatch(self, model: PreTrainedModel, offload_folder: str | None = None) -> None:
        """Put the model on the devices of the user's map, or of one made for the packed sizes."""
        device_map = self.device_map
        if isinstance(device_map, str):
            device_map = self._infer(model, device_map)
        if device_map is None:
            return
        devices = set(map(str, device_map.values()))
        if devices == {"cpu"}:
            if hasattr(model, "hf_device_map"):  # of the loading: transformers 5.0 sized the full-precision model
                model.hf_device_map = device_map  # type: ignore[assignment]
            return
        if len(devices) == 1 and "disk" not in devices:
            nn.Module.to(model, _device(next(iter(device_map.values()))))
            return
        folder = None
        if "disk" in devices:
            # Always a fresh folder: accelerate would take a stale index in an old one for this model's.
            folder = tempfile.mkdtemp(prefix="packed-", dir=offload_folder)
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
            logger.info("packed weights on disk are in %s until the model is released", folder)
        dispatch_model(
            model,
            device_map=device_map,
            offload_dir=folder,
            offload_buffers=True,
            skip_keys=model._skip_keys_device_placement,
        )
        model.tie_weights()  # accelerate gives each of the tied names a placeholder of its own
        require_sound_ties(model)

    def _infer(self, model: PreTrainedModel, strategy: str) -> dict[str, Any]:
        unsplit = sorted(model._no_split_modules or ())
        memory = self.max_memory
        if strategy != "sequential":
            low_zero = strategy == "balanced_low_0"
            memory = get_balanced_memory(model, memory, no_split_module_classes=unsplit, low_zero=low_zero)
        return infer_auto_device_map(model, memory, no_split_module_classes=unsplit)


def require_sound_ties(model: PreTrainedModel) -> None:
    """Refuse offloaded layers of a model with tied weights where an installed release would mix tensors up.

    Raises:
        ImportError: an upgrade is needed, or a ``device_map`` without offloading.
    """
    if not ties_of(model) or not is_offloaded(model):
        return
    for package, version in (SOUND_TIES, *([SOUND_TIED_TABLES] if int8_tables(model) else [])):
        installed = importlib.metadata.version(package)
        if Version(installed) < Version(version):
            raise ImportError(
                f"{package} {installed} mixes up tensors of a model whose embedding and head are tied, once some are "
                f"offloaded: pip install '{package}>={version}', or use a device_map that leaves nothing to the disk"
            )


def _device(device: Any) -> torch.device:
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, device)
    return torch.device(device)


def fetch_outside(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """:func:`fetch` everything but the decoder layers; weights that are tied stay so.

    Raises:
        ArbCalibrationError: something was not loaded at all.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    if any(hasattr(module, "_hf_hook") for module in outside):
        for module in outside:
            fetch(module)
        model.tie_weights()
    lost = next(
        (name for each in outside for name, tensor in each.named_parameters(recurse=False) if tensor.is_meta), None
    )
    if lost is not None:  # transformers 5.0 does so where max_memory leaves nothing but the disk
        raise ArbCalibrationError(
            f"a parameter {lost} was not loaded: max_memory is too small for this transformers to place the original; "
            "raise it, pass a device_map that names modules, or upgrade transformers"
        )


def offload_folder(model: nn.Module) -> str | None:
    """The folder the user gave accelerate for what is on disk, if any."""
    for module in model.modules():
        for hook in offload_hooks(module):
            folder = getattr(getattr(hook.weights_map, "dataset", None), "save_folder", None)
            if folder is not None:
                return str(folder)
    return None


def keep_stored_types(model: nn.Module) -> None:
    """Packed tensors that accelerate reads from disk keep their types.

    transformers 5.0 has it cast everything to the model's dtype, planes of bits too: the outputs would be noise.
    """
    for module in [each for each in model.modules() if isinstance(each, (BinaryLinear, Int8Table))]:
        for hook in offload_hooks(module):
            index = getattr(getattr(hook.weights_map, "dataset", None), "index", {})
            prefix = getattr(hook.weights_map, "prefix", "")
            for part, (_, dtype) in module.form.tensors().items():
                entry = index.get(f"{prefix}{part}", {})
                if "dtype" in entry:
                    entry["dtype"] = str(dtype).removeprefix("torch.")


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Bring a decoder layer to the execution device, and its binary form back to the CPU."""
    fetch_all(layer)
    if device.type == "cpu":
        yield
    else:
        layer.to(device)
        yield
        layer.to("cpu")
    return_freed_memory()


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def return_freed_memory() -> None:
    """Give freed pages back to the system: glibc keeps them, and between packed tensors they would add up."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
