"""Which of transformers' auto classes makes a model, from its ``config.json`` alone: no code of the model's is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from .errors import ArbFormatError

# Auto classes whose models write text, in the order in which they are tried, with the Hub's name of what they do. Some
# classes that take images are made by the second too.
GENERATORS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMultimodalLM": "any-to-any",
}
LAST = ("AutoModelForPreTraining", "AutoModel")  # what they make, others often make too
# Those that put another head on a decoder, or none.
TASKS = GENERATORS | {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}


def auto_class(config: Mapping[str, Any]) -> str:
    """The name of the auto class that makes the model of a config.

    It makes the class that ``architectures`` names; where that is no class of an auto class, AutoModelForCausalLM if it
    can, else the first that can. Classes of the model's own code (``auto_map``) count as transformers' own do.

    Args:
        config: the contents of ``config.json``.

    Raises:
        ArbFormatError: no auto class of this transformers makes a model of it.
    """
    makes = dict(_made(config))
    if not makes:
        raise ArbFormatError(
            f"config.json: transformers {transformers.__version__} has no language model of type "
            f"{config.get('model_type')!r}, and auto_map names none: check model_type, or upgrade transformers"
        )
    architecture = saved_class(config.get("architectures"))
    causal = [name for name in makes if name == "AutoModelForCausalLM"]
    return next((name for name, classes in makes.items() if architecture in classes), next(iter([*causal, *makes])))


def saved_class(architectures: Any) -> str | None:
    """The name of the class that a model was saved from, or None: ``architectures`` of a config holds one, if it is sound."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return first if isinstance(first, str) else None


def writes_text(config: Mapping[str, Any]) -> bool:
    """Whether a model that writes text can be made of a config, though another may be named in it."""
    return any(name in GENERATORS for name, _ in _made(config))


def needs_trust(config: Mapping[str, Any]) -> bool:
    """Whether a model can be made only by running code that comes with it, because transformers has no class for it."""
    return bool(_auto_map(config)) and auto_class(config) not in dict(_made({**config, "auto_map": None}))


def _made(config: Mapping[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """The auto classes that make a model of this config, each with the names of the classes that it makes."""
    model_type, own = config.get("model_type"), _auto_map(config)
    config_class = CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None
    others = [
        name for name in dir(modeling_auto) if name.startswith("AutoModelFor") and name not in (*GENERATORS, *LAST)
    ]
    for name in (*GENERATORS, *others, *LAST):
        mapping = getattr(getattr(modeling_auto, name, None), "_model_mapping", None)  # not every version has all
        classes = {own[name].rpartition(".")[2]} if name in own else set()
        if mapping is not None and config_class is not None and config_class in mapping:
            made = mapping[config_class]
            classes |= {each.__name__ for each in (made if isinstance(made, tuple) else (made,)) if each is not None}
        if classes:
            yield name, classes


def _auto_map(config: Mapping[str, Any]) -> dict[str, str]:
    """``auto_map``, as far as it is sound."""
    found = config.get("auto_map")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
