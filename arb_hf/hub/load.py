"""Checked loading of packed models, from a folder or the Hub."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..checks import check_counts, read_entries
from ..config import QUANT_METHOD, ArbConfig
from ..errors import ArbFormatError
from ..format.headers import INDEX, REPORT_FILE, SINGLE, current_weights, read_json, shard_names
from ..names import is_hub_id
from ..report import ArbReport

BARE_NAME = re.compile(r"[\w-][\w.-]*")  # of the oldest models on the Hub, which have no owner


def from_pretrained(model_id: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a packed model from a folder or the Hub, and refuse anything missing, unexpected or inconsistent.

    The record of its making, if it was kept, is on ``model.arb_report``.

    Args:
        model_id: as for ``AutoModelForCausalLM.from_pretrained``, which gets all ``kwargs``.

    Raises:
        ArbFormatError: the model is not packed by arb_hf, or its files and config do not agree.
        OSError: there is no such model.
    """
    require_there(model_id)
    hub_arguments = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if key in kwargs
    }
    trust = {"trust_remote_code": kwargs.setdefault("trust_remote_code", False)}
    config = _config(model_id, **hub_arguments, **trust)
    if "variant" not in kwargs:
        files = _weight_files(model_id, **hub_arguments)
        check_counts(config.to_dict(), read_entries(files, model_id))
        folder = os.path.dirname(files[0])
        if os.path.isdir(model_id) and SINGLE not in map(os.path.basename, files) and SINGLE in os.listdir(folder):
            config.transformers_weights = INDEX  # saved later than the single file, which transformers would prefer
            kwargs.setdefault("config", config)
    _check_architecture(model_id, config, **trust)
    _check_generation(model_id, **hub_arguments)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_id, output_loading_info=True, **kwargs)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = ", ".join(sorted(str(each) for each in info[kind])[:5])
            raise ArbFormatError(f"{model_id}: {kind.replace('_', ' ')} in the checkpoint: {names}")
    report = load_report(model_id, **hub_arguments)
    if report is not None:
        model.arb_report = report
    return model


def require_there(model_id: str | os.PathLike) -> None:
    """A name that can only be a folder's must be one: the Hub's answer to it would mislead.

    Raises:
        FileNotFoundError: it is not.
    """
    name = str(model_id)
    if not os.path.isdir(name) and not is_hub_id(name) and not BARE_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {model_id}")


def _config(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """The model's config, made of a ``config.json`` that is there."""
    try:
        config = AutoConfig.from_pretrained(model_id, **kwargs)
    except Exception as error:  # what a hostile file can do to its reader has no end of types
        if not os.path.isdir(model_id):
            raise  # not there, or the Hub's own errors
        raise ArbFormatError(f"{model_id}: config.json cannot be read ({_first_line(error)})") from error
    quantization = getattr(config, "quantization_config", None)
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        raise ArbFormatError(f"{model_id} is not a model packed by arb_hf: its config.json has quant_method {method!r}")
    ArbConfig.from_dict(quantization)
    if getattr(config, "transformers_weights", None) is not None:
        raise ArbFormatError(f"{model_id}: config.json names weights of its own, {config.transformers_weights!r}")
    return config


def _weight_files(model_id: str | os.PathLike, **kwargs: Any) -> list[str]:
    """Paths of the safetensors files, from the folder or, downloaded once, the cache."""
    kwargs = {**kwargs, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(model_id, INDEX, **kwargs)
    if index is None:
        names = [SINGLE]
    else:
        shards = shard_names(read_json(Path(index)))
        names = current_weights(shards, lambda name: cached_file(model_id, name, **kwargs) is not None)
    files = [cached_file(model_id, name, **kwargs) for name in names]
    for name, path in zip(names, files, strict=True):
        if path is None:
            raise ArbFormatError(f"{model_id}: {name} is missing")
    return [str(path) for path in files]


def _check_architecture(model_id: str | os.PathLike, config: Any, **kwargs: Any) -> None:
    """A model can be made of the config, without memory for its weights."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), **kwargs)
    except Exception as error:  # anything, from the class that the config names
        raise ArbFormatError(f"{model_id}: no model can be made of config.json ({_first_line(error)})") from error


def _check_generation(model_id: str | os.PathLike, **kwargs: Any) -> None:
    """``generation_config.json``, where there is one, can be read."""
    if cached_file(model_id, GENERATION_CONFIG_NAME, **kwargs, _raise_exceptions_for_missing_entries=False) is None:
        return
    try:
        GenerationConfig.from_pretrained(model_id, **kwargs)
    except Exception as error:  # as for config.json
        raise ArbFormatError(f"{model_id}: {GENERATION_CONFIG_NAME} cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load_report(model_id: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> ArbReport | None:
    """The record of the run that made a packed model, from its folder or the Hub; None if it was not kept.

    Args:
        kwargs: for a model on the Hub, as ``huggingface_hub.hf_hub_download`` takes them (``revision``, ``token``...).

    Raises:
        ArbFormatError: there is one and it cannot be read.
    """
    if os.path.isdir(model_id):
        path = os.path.join(model_id, subfolder, REPORT_FILE)
        return ArbReport.from_json(path) if os.path.isfile(path) else None
    if not is_hub_id(str(model_id)):
        return None
    try:
        return ArbReport.from_json(HfApi().hf_hub_download(str(model_id), REPORT_FILE, subfolder=subfolder, **kwargs))
    except (EntryNotFoundError, RepositoryNotFoundError):  # also: not in the cache, and no connection
        return None
