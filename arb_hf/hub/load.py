"""Checked loading of packed models, from a folder or the Hub."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..auto import auto_class, needs_trust
from ..checks import check_counts, check_surplus, read_entries
from ..config import QUANT_METHOD, ArbConfig
from ..errors import ArbFormatError
from ..format.headers import INDEX, REPORT_FILE, SINGLE, current_weights, read_json, shard_names
from ..names import is_hub_id
from ..quantizer import ArbHfQuantizer
from ..report import ArbReport

BARE_NAME = re.compile(r"[\w-][\w.-]*")  # of the oldest models on the Hub, which have no owner
# Arguments that say where files are, and are needed wherever one is read.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
# Arguments of transformers' from_pretrained that a packed model cannot obey, and why.
REFUSED = {
    "quantization_config": "a packed model is loaded as it was binarized",
    "state_dict": "the weights are those of the model's files: to change them, load the model first",
    "ignore_mismatched_sizes": "a packed model is loaded whole; for a new head use the auto class that has it",
    "key_mapping": "the tensors of a packed model have its own names",
    "gguf_file": "a packed model is in safetensors files",
    "load_in_8bit": "a packed model is loaded as it was binarized",
    "load_in_4bit": "a packed model is loaded as it was binarized",
}


def from_pretrained(model_id: str | os.PathLike, **kwargs: Any) -> Any:
    """Load a packed model from a folder or the Hub, and refuse anything missing, unexpected or inconsistent.

    The model is of the class that it was saved from: a causal language model, one that also takes images, a classifier.
    Another head on the same backbone needs transformers' own classes, ``AutoModelForSequenceClassification`` for one.
    The record of its making, if it was kept, is on ``model.arb_report``.

    Args:
        model_id: as for ``AutoModelForCausalLM.from_pretrained``.
        kwargs: for the same, with these differences: ``trust_remote_code`` is False by default, and nothing asks;
            ``config`` may also be a path.

    Returns:
        The model, a ``PreTrainedModel``; with ``output_loading_info=True`` a pair of it and the information, as there.

    Raises:
        ArbFormatError: the model is not packed by arb_hf, or its files and config do not agree.
        OSError: there is no such model.
        ValueError: an argument that a packed model cannot obey, or the model has code of its own that is not trusted.
    """
    require_there(model_id)
    refused = {name: reason for name, reason in REFUSED.items() if kwargs.get(name) not in (None, False)}
    if kwargs.get("use_safetensors") is False:
        refused["use_safetensors=False"] = "a packed model is in safetensors files"
    for name, reason in refused.items():
        raise ValueError(f"arb_hf.from_pretrained cannot take {name}: {reason}")
    hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    kwargs.pop("force_download", None)  # what is checked here is then loaded from the cache
    with_info = kwargs.pop("output_loading_info", False)
    trust = {"trust_remote_code": kwargs.setdefault("trust_remote_code", False)}
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        config = given
    else:
        config = _read_config(model_id if given is None else given, **hub_arguments, **trust)
    if given is not None:
        kwargs["config"] = config
    _check_config(config, model_id)
    files = _weight_files(model_id, kwargs.get("variant"), **hub_arguments)
    check_counts(config.to_dict(), read_entries(files, model_id))
    if kwargs.get("variant") is None and _is_newer_than_single(files, model_id):
        config.transformers_weights = INDEX  # transformers would prefer the single file
        kwargs["config"] = config
    auto = getattr(transformers, auto_class(config.to_dict()))
    _check_architecture(model_id, auto, config, **trust)
    _check_generation(model_id, **hub_arguments)
    model, info = auto.from_pretrained(model_id, output_loading_info=True, **kwargs)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            names = ", ".join(sorted(str(each) for each in info[problem])[:5])
            raise ArbFormatError(f"{model_id}: {problem.replace('_', ' ')} in the checkpoint: {names}")
    report = load_report(model_id, **hub_arguments)
    if report is not None:
        model.arb_report = report
    return (model, info) if with_info else model


def checked_skeleton(model_id: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The model of a packed folder on the meta device, for others to load: its form, after all checks but those of values.

    Of a model on the Hub, whose files whoever loads it fetches, only the config is read.

    Args:
        kwargs: ``revision``, ``token`` and others that say where files are.

    Raises:
        ArbFormatError, OSError, ValueError: as :func:`from_pretrained`.
    """
    require_there(model_id)
    config = _read_config(model_id, trust_remote_code=trust_remote_code, **kwargs)
    quantizer = ArbHfQuantizer(_check_config(config, model_id), pre_quantized=True)
    files = _weight_files(model_id, **kwargs) if os.path.isdir(model_id) else None
    entries = None if files is None else read_entries(files, model_id)
    if entries is not None:
        check_counts(config.to_dict(), entries)
    auto = getattr(transformers, auto_class(config.to_dict()))
    model = _check_architecture(model_id, auto, config, trust_remote_code=trust_remote_code)
    model.name_or_path = os.fspath(model_id)
    quantizer.preprocess_model(model, checkpoint_files=files)
    if entries is not None:
        check_surplus(model, entries)
    return model


def require_there(model_id: str | os.PathLike) -> None:
    """Refuse a name that can only be a folder's and is none: the Hub's answer to it would mislead.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    name = str(model_id)
    if not os.path.isdir(name) and not is_hub_id(name) and not BARE_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {model_id}")


def _read_config(model_id: str | os.PathLike, trust_remote_code: bool, **kwargs: Any) -> PreTrainedConfig:
    """The model's config, made of a ``config.json`` that is there; code of the model's own runs only if trusted."""
    try:
        stored, _ = PreTrainedConfig.get_config_dict(model_id, **kwargs)
        require_trust(model_id, stored, trust_remote_code)
        return AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code, **kwargs)
    except (Untrusted, ArbFormatError):
        raise
    except Exception as error:  # reading a hostile file can raise any type
        if not os.path.isdir(model_id):
            raise  # not there, or the Hub's own errors
        raise ArbFormatError(f"{model_id}: config.json cannot be read ({_first_line(error)})") from error


class Untrusted(ValueError):
    """A model comes with code that the user has not allowed to run."""


def require_trust(model_id: str | os.PathLike, config: dict[str, Any], trusted: bool) -> None:
    """Refuse a model that needs code of its own, before any of it runs; nothing asks on the terminal.

    Raises:
        Untrusted: it does, and ``trusted`` is False.
    """
    if needs_trust(config) and not trusted:
        raise Untrusted(
            f"{model_id} comes with code of its own, which runs when it is loaded: read the .py files there, and if you "
            "trust them pass trust_remote_code=True, or --trust-remote-code on the command line"
        )


def _check_config(config: PreTrainedConfig, model_id: str | os.PathLike) -> ArbConfig:
    """What the config says of a packed model; it is of one, and sends its reader nowhere else."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, ArbConfig):  # of a model in memory
        quantization = quantization.to_dict()
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        raise ArbFormatError(f"{model_id} is not a model packed by arb_hf: its config.json has quant_method {method!r}")
    packed = ArbConfig.from_dict(quantization)
    if getattr(config, "transformers_weights", None) is not None:
        raise ArbFormatError(f"{model_id}: config.json names weights of its own, {config.transformers_weights!r}")
    return packed


def _weight_files(model_id: str | os.PathLike, variant: str | None = None, **kwargs: Any) -> list[str]:
    """Paths of the safetensors files, from the folder or, downloaded once, the cache."""
    kwargs = {**kwargs, "_raise_exceptions_for_missing_entries": False}
    single, index_name = SINGLE, INDEX
    if variant is not None:
        single, index_name = f"model.{variant}.safetensors", INDEX.removesuffix("json") + f"{variant}.json"
    index = cached_file(model_id, index_name, **kwargs)
    if index is None:
        names = [single]
    else:
        names = shard_names(read_json(Path(index)))
        if variant is None:
            names = current_weights(names, lambda name: cached_file(model_id, name, **kwargs) is not None)
    files = [cached_file(model_id, name, **kwargs) for name in names]
    for name, path in zip(names, files, strict=True):
        if path is None:
            raise ArbFormatError(f"{model_id}: {name} is missing")
    return [str(path) for path in files]


def _is_newer_than_single(files: list[str], model_id: str | os.PathLike) -> bool:
    """Whether a folder has shards that were saved later than the single file that still lies beside them."""
    folder = os.path.dirname(files[0])
    return os.path.isdir(model_id) and SINGLE not in map(os.path.basename, files) and SINGLE in os.listdir(folder)


def _check_architecture(
    model_id: str | os.PathLike, auto: Any, config: PreTrainedConfig, **kwargs: Any
) -> PreTrainedModel:
    """The model that can be made of the config, without memory for its weights."""
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config), **kwargs)
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
        subfolder: where in the folder or repository the model is.
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
