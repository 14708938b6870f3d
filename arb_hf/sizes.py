"""Sizes of a model's weight files to the byte, computed from a model without weights: what ``save_pretrained`` would write.

And the other way round: the bits per weight that keep them within ``ArbConfig(max_size=...)``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from accelerate.utils import convert_file_size_to_int
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from .architecture import input_embeddings
from .binarize import BinarizeOptions
from .binarize.counts import salient_columns
from .calibrate.choices import nominal_forms, possible_bits
from .calibrate.decoder import find_decoder_layers
from .calibrate.tables import survey_model
from .checks import SAFETENSORS_TYPES
from .config import ArbConfig
from .coverage import Coverage, Matrix
from .errors import ArbCalibrationError
from .nn import binary_modules
from .nn.tables import ties_of
from .skeleton import skeleton_like, swap_in_binary_modules

logger = logging.getLogger(__name__)

PATTERN = "model{suffix}.safetensors"
ALIGNMENT = 8  # of a header's end
BINARY, TABLES, REST, HEADERS = "binary layers", "embeddings and head", "norms and the rest", "file headers"
KEPT = "other matrices of the decoder layers"


@dataclass(frozen=True)
class Files:
    """``sizes``: bytes of each weight file by name. ``parts``: the same bytes by what they hold."""

    sizes: dict[str, int]
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def packed_files(
    empty: PreTrainedModel, config: ArbConfig, coverage: Coverage, layers: str, max_shard_size: int | str = "50GB"
) -> Files:
    """In place: give a model on the meta device the modules of a run; returns the files that saving it would write.

    Args:
        layers, max_shard_size: as for :func:`weight_files`.
    """
    run, forms = copy.deepcopy(config), _likely_forms(config, coverage.to_binarize())
    run.modules = {name: config.module_entry(form, form.salient_columns or 0) for name, form in forms.items()}
    run.embeddings = [each.name for each in coverage.tables if each.kept is None]
    swap_in_binary_modules(empty, run)
    return weight_files(empty, layers, max_shard_size)


def _likely_forms(config: ArbConfig, matrices: Sequence[Matrix]) -> dict[str, BinarizeOptions]:
    """The forms of a run, with their number of salient columns, as far as shapes and options decide them.

    With ``bits`` the forms are those of :func:`arb_hf.calibrate.choices.nominal_forms`.
    """
    forms = {}
    for each in matrices:
        options = config.options(each.name)
        count = salient_columns(*each.shape, options).likely
        forms[each.name] = dataclasses.replace(options, salient_columns=count)
    return forms if config.bits is None else forms | nominal_forms(config, matrices, config.bits)


def bits_within(model: PreTrainedModel, config: ArbConfig, skip: list[str]) -> float:
    """The most bits per weight with which the weight files of a run keep within ``config.max_size``.

    Args:
        model: the original; only its structure counts.
        skip: names of modules that stay in full precision.

    Raises:
        ArbCalibrationError: no choice of forms has that size; the message has the range that is possible.
    """
    empty = skeleton_like(model)
    prefix, layers = find_decoder_layers(empty)
    coverage = survey_model(empty, prefix, layers, config, skip)
    matrices = coverage.to_binarize()
    weights = sum(each.weights for each in matrices)
    limit = bytes_of(config.max_size)

    low, high = possible_bits(config, matrices)
    # The largest forms have the most tensors, and so the longest headers: nothing that a run chooses has longer ones.
    asked = copy.deepcopy(config)
    asked.max_size, asked.bits = None, high
    files = packed_files(empty, asked, coverage, prefix)
    rest = files.total - files.parts[BINARY]
    if limit < rest + low * weights / 8:
        raise ArbCalibrationError(
            f"max_size={config.max_size!r} is not possible: with these options the weight files of {type(model).__name__} "
            f"take {(rest + low * weights / 8) / 1e6:,.2f} to {files.total / 1e6:,.2f} MB"
        )
    bits = min(high, (limit - rest) * 8 / weights)
    logger.info("max_size=%s: %.4f bits per weight", config.max_size, bits)
    return bits


def bytes_of(size: int | str | None) -> int:
    """``"600MB"`` as 600,000,000, by the rules of ``max_shard_size``."""
    return int(convert_file_size_to_int(size.replace(" ", "").upper() if isinstance(size, str) else size or 0))


def weight_files(model: PreTrainedModel, layers: str, max_shard_size: int | str) -> Files:
    """The weight files that saving a model would write.

    Args:
        model: on the meta device, with its binary modules in place.
        layers: name of the list of decoder layers.
        max_shard_size: as for ``save_pretrained``.
    """
    tensors = saved_tensors(model)
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    sizes, headers = {}, 0
    for name, keys in split.filename_to_tensors.items():
        shard = {key: tensors[key] for key in keys}
        header = header_size(shard)
        headers += header
        sizes[name] = header + sum(each.nbytes for each in shard.values())
    tables = _tables(model)
    parts = dict.fromkeys((BINARY, TABLES, KEPT, REST), 0)
    binary = set(binary_modules(model))
    for key, tensor in tensors.items():
        owner, _, own = key.rpartition(".")
        matrix = tensor.numel() > tensor.shape[-1:].numel() and not own.endswith("bias")
        if owner in binary and own != "bias":
            part = BINARY
        elif matrix and key.startswith(f"{layers}."):
            part = KEPT
        else:
            part = TABLES if owner in tables else REST
        parts[part] += tensor.nbytes
    return Files(sizes, {**parts, HEADERS: headers})


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model's files; tied ones once, under the name that is not tied.

    In the order in which transformers fills shards with those of a model in memory.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = set(ties_of(model))
    holders: dict[int, list[str]] = {}
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in ignored}
    for name, tensor in tensors.items():
        holders.setdefault(id(tensor), []).append(name)
    twice = {name for names in holders.values() for name in _copies(names, tied)}
    names = sorted(tensors.keys() - twice, key=dot_natural_key)
    return {name: tensors[name].detach() for name in names}


def _copies(names: list[str], tied: set[str]) -> list[str]:
    """Of the names of one tensor, those under which it is not written."""
    copies = sorted(name for name in names if name in tied)
    return copies[:-1] if len(copies) == len(names) else copies


def header_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file before its first tensor: the length and the JSON, padded to a multiple of 8."""
    rank = {dtype: place for place, dtype in enumerate(_stored_order())}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name)):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        shape, offsets = list(tensor.shape), [start, end]
        header[name] = {"dtype": SAFETENSORS_TYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return ALIGNMENT + -(-length // ALIGNMENT) * ALIGNMENT


@functools.cache
def _stored_order() -> list[torch.dtype]:
    """The order in which safetensors stores tensors of different types: found by asking it."""
    by_name = {safetensors_name: dtype for dtype, safetensors_name in SAFETENSORS_TYPES.items()}
    data = safetensors.torch.save({name: torch.empty(0, dtype=dtype, device="cpu") for name, dtype in by_name.items()})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [by_name[name] for name in header]


def _tables(model: PreTrainedModel) -> set[str]:
    """The names of all embeddings, and of the head."""
    ends = {id(each) for each in (input_embeddings(model), model.get_output_embeddings()) if each is not None}
    return {name for name, each in model.named_modules() if id(each) in ends or isinstance(each, nn.Embedding)}
