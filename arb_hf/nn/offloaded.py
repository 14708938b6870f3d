"""Parameters that accelerate keeps elsewhere, on disk or in memory: how to read them, and how to get them back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from ..format.packing import unpack
from ..format.weight import BinaryWeight
from .linear import BinaryLinear


def offload_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of ``module`` itself that fetch its parameters for every call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    aligning = [each for each in hooks if isinstance(each, AlignDevicesHook)]
    return [each for each in aligning if each.offload and each.weights_map is not None]


def is_offloaded(model: nn.Module) -> bool:
    """Are parameters of the model kept elsewhere?"""
    return any(offload_hooks(module) for module in model.modules())


def fetch(module: nn.Module) -> None:
    """Give a module's own parameters back what accelerate keeps of them elsewhere, and take its hook off."""
    for hook in offload_hooks(module):
        for name, tensor in list(named_module_tensors(module, include_buffers=hook.offload_buffers)):
            if tensor.device.type == "meta" and name in hook.weights_map:
                value = hook.weights_map[name]
                if isinstance(tensor, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=False)
                setattr(module, name, value)
    remove_hook_from_module(module)


def fetch_all(module: nn.Module) -> None:
    """:func:`fetch` everything in a module, a decoder layer for example."""
    for each in list(module.modules()):
        fetch(each)


def stored_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names of a module's parameters and how to read each, wherever accelerate keeps it; tied ones under each name."""
    for child_name, child in module.named_modules(prefix=prefix):
        maps = [hook.weights_map for hook in offload_hooks(child)]
        for name, parameter in child.named_parameters(recurse=False):
            source = next((each for each in maps if parameter.device.type == "meta" and name in each), None)
            full = f"{child_name}.{name}" if child_name else name
            yield full, functools.partial(_read, parameter, source, name)


def _read(parameter: nn.Parameter, source: Mapping[str, Tensor] | None, name: str) -> Tensor:
    return parameter.data if source is None else source[name]


def stored_weight(layer: BinaryLinear) -> BinaryWeight:
    """The layer's weight unpacked, with the scales as stored, wherever accelerate keeps the tensors."""
    tensors = {name: read() for name, read in stored_tensors(layer)}
    return unpack({name: tensors[name] for name in layer.form.tensors()}, layer.form)


def files_on_disk(model: nn.Module) -> set[str]:
    """The checkpoint's files from which parameters are read for every call."""
    maps = [hook.weights_map for module in model.modules() for hook in offload_hooks(module)]
    indices = [getattr(getattr(each, "dataset", None), "index", {}) for each in maps]
    return {entry["safetensors_file"] for index in indices for entry in index.values() if "safetensors_file" in entry}
