"""What a model's class and config say of it, for all classes alike: fields that only some configs have, and prefixes.

Configs differ: fields are missing, have other names, or belong to a part (``text_config``). What the package wants to know
of a model is asked here, so that no other file reads ``model.config`` field by field.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .errors import ArbCalibrationError

# What configs call the longest sequence. Others, such as BLOOM's seq_length, are no limit of the model.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


def text_config(model: PreTrainedModel) -> Any:
    """The config of the language model; the model's own where that has no part for it, or several."""
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # several
        return model.config


def field(model: PreTrainedModel, name: str, default: Any = None) -> Any:
    """A field of the language model's config; ``default`` where there is none."""
    return getattr(text_config(model), name, default)


def vocabulary(model: PreTrainedModel) -> int | None:
    """The number of token ids that a model knows: what its config says, or the rows of its input embeddings."""
    size = field(model, "vocab_size")
    return size if isinstance(size, int) else getattr(input_embeddings(model), "num_embeddings", None)


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens that a model takes, or None where its config sets no limit."""
    lengths = (field(model, name) for name in LENGTHS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def hidden_size(model: PreTrainedModel) -> int:
    """The width of the hidden states: what the config says, or that of the largest embedding."""
    size = field(model, "hidden_size")
    if isinstance(size, int):
        return size
    tables = [each.weight for each in model.modules() if isinstance(each, nn.Embedding)]
    return max(tables, key=lambda table: table.numel()).shape[-1] if tables else 0


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that looks up tokens, or None where a model of custom code does not say which it is."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def has_custom_code(model: PreTrainedModel) -> bool:
    """Whether the model's class was loaded from its own folder, which needed ``trust_remote_code=True``."""
    return type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def require_savable_generation(model: PreTrainedModel) -> None:
    """Refuse a model whose generation config transformers would not write again, before hours go into the model.

    Raises:
        ArbCalibrationError: with transformers' reason.
    """
    if not model.can_generate() or getattr(model, "generation_config", None) is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ArbCalibrationError(
                f"the model's generation_config.json could not be saved with it ({reason}): correct it first"
            ) from error


def forward_arguments(model: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that the model's forward takes; forwards of custom code may lack some."""
    parameters = inspect.signature(model.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def logits_of(model: PreTrainedModel, ids: Tensor, **arguments: Tensor) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` of tokens ``[batch, length]``.

    Raises:
        ValueError: the model is no language model.
    """
    output = model(input_ids=ids, **forward_arguments(model, use_cache=False, **arguments))
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):  # config.return_dict is False
        logits = output[0]
    size = vocabulary(model)
    if logits is None or logits.dim() != 3 or (size is not None and logits.shape[-1] < size):
        raise ValueError(
            f"{type(model).__name__} gives no logits over its vocabulary, which only a language model has: "
            "load it with AutoModelForCausalLM"
        )
    return logits


@contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Run the model without a cache of keys and values, also where its config has no such field."""
    config = text_config(model)
    before = {name: value for name, value in vars(config).items() if name == "use_cache"}
    config.use_cache = False
    try:
        yield
    finally:
        del config.use_cache
        vars(config).update(before)


@dataclass(frozen=True)
class Prefix:
    """How names in a checkpoint become names in a model of another class: ``model.layers.0`` or ``layers.0``.

    Attributes:
        stored, own: what names of the backbone begin with, in the checkpoint and in the model; with a dot, or empty.
        children: names of what the backbone holds; other names, a head's, stay as they are.
    """

    stored: str
    own: str
    children: frozenset[str]

    @staticmethod
    def of(model: PreTrainedModel, names: list[str]) -> Prefix:
        """That of a model and a checkpoint in which the modules ``names`` belong to the backbone."""
        backbone: Any = model.base_model
        own = "" if backbone is model else f"{model.base_model_prefix}."
        children = frozenset(
            name for name, _ in (*backbone.named_children(), *backbone.named_parameters(recurse=False))
        )
        parts = names[0].split(".") if names else []
        above = next((index for index, part in enumerate(parts) if part in children), 0)
        for stored in (own, "".join(f"{part}." for part in parts[:above])):
            prefix = Prefix(stored, own, children)
            if all(prefix.covers(name) for name in names):
                return prefix
        return Prefix(own, own, children)

    def covers(self, name: str) -> bool:
        """Whether a name of the checkpoint is one of the backbone's."""
        return name.startswith(self.stored) and name[len(self.stored) :].partition(".")[0] in self.children

    def renamed(self, name: str) -> str:
        """A checkpoint's name of a module or tensor as the model's."""
        return self.own + name[len(self.stored) :] if self.covers(name) else name

    @property
    def changes(self) -> bool:
        """Whether there is a prefix to take away or to replace; one that the checkpoint lacks, transformers adds itself."""
        return bool(self.stored) and self.stored != self.own
