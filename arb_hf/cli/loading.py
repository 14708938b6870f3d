"""Loading what a command names: a model of any class, its tokenizer or processor, and errors that say which."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import transformers
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import cached_file

from ..auto import auto_class
from ..hub.card import PROCESSOR_FILES
from ..hub.load import require_there
from ..hub.source import naming, read_config
from ..text import load_tokenizer

logger = logging.getLogger(__name__)


def load(model: str, dtype: Any, args: argparse.Namespace, **kwargs: Any) -> PreTrainedModel:
    """A dense or packed model, of the class that its config names."""
    if args.device_map is not None:
        kwargs["device_map"] = args.device_map
    auto = getattr(transformers, auto_class(read_config(model, args.trust_remote_code)))
    with naming(model):
        return auto.from_pretrained(model, dtype=dtype, trust_remote_code=args.trust_remote_code, **kwargs)


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
