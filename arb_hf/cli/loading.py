"""Loading what a command names: a model of any class, its tokenizer or processor, and errors that say which."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..auto import auto_class
from ..hub.card import PROCESSOR_FILES
from ..hub.load import require_there, require_trust
from ..text import load_tokenizer

logger = logging.getLogger(__name__)


def load(model: str, dtype: Any, args: argparse.Namespace, **kwargs: Any) -> PreTrainedModel:
    """A dense or packed model, of the class that its config names."""
    if args.device_map is not None:
        kwargs["device_map"] = args.device_map
    auto = getattr(transformers, auto_class(read_config(model, args.trust_remote_code)))
    with naming(model):
        return auto.from_pretrained(model, dtype=dtype, trust_remote_code=args.trust_remote_code, **kwargs)


def read_config(model: str, trusted: bool) -> dict[str, Any]:
    """What ``config.json`` holds; refused if the model needs code of its own that is not trusted."""
    with naming(model):
        config, _ = PreTrainedConfig.get_config_dict(model)
    if not config:  # transformers gives an empty one where there is none
        raise OSError(f"{model} has no config.json: it is not a model")
    require_trust(model, config, trusted)
    return config


def refuse_quantized(model: str, trusted: bool) -> None:
    """Refuse a model that is quantized already, by arb_hf or by another method."""
    quantization = read_config(model, trusted).get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(f"{model} is quantized already (quant_method {method!r}): quantize its original")


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Errors of loading that name what was asked for: transformers' own do not always."""
    require_there(model)
    try:
        yield
    except OSError as error:
        nor_here = "" if os.path.isdir(model) else f" (nor is there a folder {model} here)"
        raise OSError(f"{model} does not load{nor_here}: {error}") from error


def find_tokenizer(model: str, trusted: bool) -> Any:
    """The model's tokenizer; None, and a warning, if it has none that loads."""
    require_there(model)
    try:
        return load_tokenizer(model, trust_remote_code=trusted)
    except Exception as error:  # a model may come without one
        logger.warning("%s has no tokenizer that loads (%s)", model, _first_line(error))
        return None


def find_processor(model: str, tokenizer: Any, trusted: bool) -> Any:
    """What belongs beside the model's weights: its processor if it takes more than text, else the tokenizer."""
    with naming(model):
        found = [cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES]
    if not any(found):
        return tokenizer
    try:
        return AutoProcessor.from_pretrained(model, trust_remote_code=trusted)
    except Exception as error:  # it may need packages that text does not
        logger.warning(
            "the processor of %s does not load (%s): the tokenizer is written alone; copy %s yourself",
            model,
            _first_line(error),
            " or ".join(PROCESSOR_FILES),
        )
        return tokenizer


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def need(tokenizer: Any, model: str) -> Any:
    """The tokenizer, or an error that names the model without one."""
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, and this needs one")
    return tokenizer
