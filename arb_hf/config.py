"""`ArbConfig`: every choice of a run, validated when made, and stored in ``config.json``."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .binarize.methods import METHODS
from .binarize.options import CHOSEN_BY_USERS, REFINEMENTS, SALIENT_METRICS, SCALE_DTYPE, BinarizeOptions
from .errors import ArbFormatError
from .format import FORMAT_VERSION, WORD
from .format.form import SCALE_DTYPES, BinaryForm
from .overrides import select

QUANT_METHOD = "arb_hf"
MAX_BLOCK_SIZE = 65536
SIZE = re.compile(r"\d+(\.\d+)? ?[KMGT]B", re.IGNORECASE)
MAX_BITS = 16  # more than any form takes; what a model's forms can take is known once its shapes are
# Objects a user may pass that have no place in JSON; copies of the config share them.
SHARED = ("dataset", "tokenizer")
# Options that a module may have for itself, and those of them that its packed form depends on.
PER_MODULE = CHOSEN_BY_USERS
FORM_OPTIONS = ("method", "block_size", "group_bitmap", "column_group_bitmap", "scale_dtype")
# Options that have one of a few names.
CHOICES = {
    "method": tuple(METHODS),
    "refinement": REFINEMENTS,
    "salient_metric": SALIENT_METRICS,
    "scale_dtype": tuple(SCALE_DTYPES),
    "embedding_dtype": ("int8", "model"),
}
# Options that a run with ``bits`` decides for each matrix, where its override does not.
DECIDED_BY_BITS = ("group_bitmap", "column_group_bitmap", "max_salient_columns")
# Options that have no effect beside a value of another.
IDLE_BESIDE = (
    ("iterations", "refinement", "full"),
    ("iterations", "method", "billm"),
    ("column_group_bitmap", "group_bitmap", False),
)
# Options whose default, written None, depends on the refinement.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tune_steps": {"full": 32, "paper": 0},
    "scale_dtype": SCALE_DTYPE,
    "embedding_dtype": {"full": "int8", "paper": "model"},
}
# What options that are absent mean in a config stored by version 0.1, whose default was the published algorithm. It
# stored all options, so that only a file changed by hand lacks any.
FORMER_DEFAULTS = {"refinement": "paper", "scale_dtype": "float16", "embedding_dtype": "model", "distill_steps": 0}
FIRST_WITH_TABLES = 2  # the version of the format that int8 embeddings came with


class ArbConfig(QuantizationConfigMixin):
    """How to binarize a model, for ``from_pretrained(..., quantization_config=ArbConfig(...))``.

    Args:
        method: ``"arb-rc"`` (row and column scales), ``"arb-x"`` (calibrated row scales and means), ``"arb"`` (row
            scales and means) or ``"billm"`` (the same without refinement).
        block_size: columns that share one row scale, a multiple of 32.
        column_group_bitmap: two magnitude groups for salient columns too. No effect with ``group_bitmap=False``.
        group_bitmap: two magnitude groups per row and block; False: one group, with which arb-rc takes about 1.3 bits
            per weight with int8 scales, 1.5 with float16.
        iterations: rounds of alternating refinement (the paper's 15); ``refinement="full"`` and ``"billm"`` have none.
        salient_metric: rank columns by ``"hessian"`` saliency or by weight ``"magnitude"``.
        max_salient_columns: exclusive limit of salient columns per block; with ``refinement="full"``, which chooses
            them over the whole matrix, the highest average per block.
        damping: fraction of the mean of H's diagonal that is added to it.
        refinement: ``"full"``: everything that helps at the same bits, see README; ``"paper"``: the published algorithm,
            exact, with the published storage. ``"full"`` takes from ``method`` only what is stored, row and column
            scales or row scales and means: ``"arb-x"``, ``"arb"`` and ``"billm"`` then do the same.
        tune_steps: gradient steps that tune each decoder layer after it is binarized, 0 for none. None: what belongs to
            the refinement; ``"paper"`` is never tuned. Layers with experts are left out.
        distill_steps: gradient steps that, once all layers are binarized, bring the model's predictions back to the
            original's by its scales and norms alone, 0 for none. None: as many as ``tune_steps``. Models with experts are
            left as they are.
        bits: true bits per binarized weight, averaged over the model, met within 0.5 %: every matrix gets the form (one
            magnitude group or two, how many salient columns) that serves the model best, by how much a small error of each
            changes its predictions. ``group_bitmap``, ``column_group_bitmap`` and ``max_salient_columns`` then have no effect,
            except in ``overrides``. Needs ``refinement="full"``. None: every matrix has the form that these three say.
        max_size: how large the weight files may be together, in bytes or as ``"600MB"``: the run takes as many ``bits`` as
            that leaves for the binarized weights, and says how many.
        dataset: calibration data: a name (``"c4"``, ``"wikitext2"``, ``"ptb"``) or a path (.txt, .raw, .jsonl,
            .parquet, the first three also as .gz); in Python also a list of strings, chats, token ids or
            ``{"input_ids", "attention_mask"}``, a ``datasets.Dataset``, or a stream of such rows. Of text longer than
            2 Mi characters only what the windows need is read; of a stream, as of ``"c4"``, its beginning.
        num_samples: number of calibration windows drawn from the text.
        sequence_length: tokens per window; no effect on token ids.
        batch_size: windows per forward pass.
        seed: seed for choosing the windows; the global random state is not touched.
        tokenizer: tokenizer of the calibration text, a name or a folder; in Python also a tokenizer object. None: the
            model's own.
        modules_to_not_convert: names of modules to keep in full precision, **added to** the default list (heads,
            embeddings): full names, or their last parts. A name that matches no module is refused.
        overrides: options of single modules, ``{pattern: {"block_size": 64, ...}}``, or ``{pattern: None}`` (``null``
            in JSON) to keep them in full precision. The options from ``method`` to ``refinement`` above are allowed,
            and ``scale_dtype``; with ``refinement`` comes its default for ``scale_dtype``. A pattern is a glob over
            full module names that covers what it matches and all inside it; of several, the one with the most literal
            characters counts (:mod:`arb_hf.overrides`).
        minimum_coverage: smallest share of the decoder layers' matrix weights, not counting those kept on request, that
            must be binarized; where less can be, the run stops before calibration. 0 accepts any share.
        scale_dtype: type in which scales and means are stored: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"int8"``.
            None: what belongs to the refinement.
        embedding_dtype: type in which the input embedding and the head are stored: ``"int8"``, with a scale for each row,
            wherever that is harmless, or ``"model"``, the model's own. None: what belongs to the
            refinement. What ``modules_to_not_convert`` names or
            ``overrides`` keeps is kept as it is.
        checkpoint_dir: folder in which finished decoder layers are kept, to resume from after a crash.
        format_version: version of the packed format; set by the package.
        modules: what was binarized and how; set by a run, read when a packed model is loaded.
        embeddings: names of the embeddings and heads that are stored as int8; set and read as ``modules``.

    Raises:
        TypeError: there is no such option.
        ValueError: an option has a value that is not allowed; the message names all three.
    """

    def __init__(
        self,
        method: str = BinarizeOptions.method,
        block_size: int = BinarizeOptions.block_size,
        column_group_bitmap: bool = BinarizeOptions.column_group_bitmap,
        group_bitmap: bool = BinarizeOptions.group_bitmap,
        iterations: int = BinarizeOptions.iterations,
        salient_metric: str = BinarizeOptions.salient_metric,
        max_salient_columns: int = BinarizeOptions.max_salient_columns,
        damping: float = BinarizeOptions.damping,
        refinement: str = BinarizeOptions.refinement,
        tune_steps: int | None = None,
        distill_steps: int | None = None,
        bits: float | None = None,
        max_size: int | str | None = None,
        dataset: Any = "c4",
        num_samples: int = 128,
        sequence_length: int = 2048,
        batch_size: int = 1,
        seed: int = 0,
        tokenizer: Any = None,
        modules_to_not_convert: list[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        minimum_coverage: float = 0.9,
        scale_dtype: str | None = None,
        embedding_dtype: str | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, dict[str, Any]] | None = None,
        embeddings: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = kwargs.pop("quant_method", QUANT_METHOD)  # type: ignore[assignment]
        self.method = method
        self.block_size = block_size
        self.column_group_bitmap = column_group_bitmap
        self.group_bitmap = group_bitmap
        self.iterations = iterations
        self.salient_metric = salient_metric
        self.max_salient_columns = max_salient_columns
        self.damping = damping
        self.refinement = refinement
        self.tune_steps: int = tune_steps  # type: ignore[assignment]
        self.distill_steps: int = distill_steps  # type: ignore[assignment]
        self.bits = bits
        self.max_size = max_size
        self.dataset = dataset
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer = tokenizer
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = overrides
        self.minimum_coverage = minimum_coverage
        self.scale_dtype: str = scale_dtype  # type: ignore[assignment]
        self.embedding_dtype: str = embedding_dtype  # type: ignore[assignment]
        self.checkpoint_dir = None if checkpoint_dir is None else os.fspath(checkpoint_dir)
        self.format_version = format_version
        self.modules = modules
        self.embeddings = embeddings
        if kwargs:
            near = {name: difflib.get_close_matches(name, vars(self), 1) for name in sorted(kwargs)}
            named = ", ".join(name + (f" (did you mean {like[0]}?)" if like else "") for name, like in near.items())
            raise TypeError(f"ArbConfig does not know {named}")
        self._validate()
        if self.modules is None:  # a choice that is being made, not one that is read back
            self._warn_of_idle_options()
        if not self.group_bitmap:
            self.column_group_bitmap = False

    def _validate(self) -> None:
        self._one_of("quant_method", (QUANT_METHOD,))
        self._one_of("refinement", REFINEMENTS)
        for option, by_refinement in DEFAULTS.items():
            if getattr(self, option) is None:
                setattr(self, option, by_refinement[self.refinement])
        if self.distill_steps is None:
            self.distill_steps = self.tune_steps
        for option, allowed in CHOICES.items():
            self._one_of(option, allowed)
        self._integer("block_size", WORD, MAX_BLOCK_SIZE)
        if self.block_size % WORD:
            self._refuse("block_size", f"a multiple of {WORD}")
        self._one_of("column_group_bitmap", (True, False))
        self._one_of("group_bitmap", (True, False))
        self._integer("iterations", 1, 10_000)
        self._integer("max_salient_columns", 1, MAX_BLOCK_SIZE)
        self._number("damping")
        for option in ("tune_steps", "distill_steps"):
            self._integer(option, 0, 1_000_000)
            if getattr(self, option) and self.refinement == "paper":
                self._refuse(option, '0 or None: refinement="paper" is the published algorithm; choose "full"')
        if self.bits is not None:
            self._number("bits", MAX_BITS)
        if self.max_size is not None:
            self._validate_max_size()
        for option in ("bits", "max_size"):
            if getattr(self, option) is not None and self.refinement == "paper":
                self._refuse(option, 'None: refinement="paper" is the published algorithm; choose "full"')
        self._integer("num_samples", 1)
        self._integer("sequence_length", 1)
        self._integer("batch_size", 1)
        self._integer("seed", 0, 2**63 - 1)
        self._integer("format_version", 1)
        names = self.modules_to_not_convert
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            self._refuse("modules_to_not_convert", "a list of module names, or None")
        if not (self.tokenizer is None or isinstance(self.tokenizer, str | os.PathLike) or callable(self.tokenizer)):
            self._refuse("tokenizer", "a name, a folder, a tokenizer, or None")
        self._number("minimum_coverage", 1)
        if self.overrides is not None:
            self._validate_overrides()
        if self.modules is not None:
            self._validate_modules()
        if self.embeddings is not None:
            self._validate_embeddings()

    def _validate_max_size(self) -> None:
        size = self.max_size
        if not (type(size) is int and size > 0) and not (isinstance(size, str) and SIZE.fullmatch(size)):
            self._refuse("max_size", 'a number of bytes, or one with a unit, such as "600MB" or "1.5GB"')
        if self.bits is not None and self.modules is None:
            self._refuse("max_size", "None beside bits: the one gives the other")

    def _warn_of_idle_options(self) -> None:
        """Warn of options that were set and have no effect beside the others, nor in an override."""
        common = {name: getattr(self, name) for name in PER_MODULE}
        chosen = {name: value for name, value in common.items() if value != getattr(BinarizeOptions, name)}
        deciding = next((name for name in ("bits", "max_size") if getattr(self, name) is not None), None)
        for option in (name for name in DECIDED_BY_BITS if deciding and name in chosen):
            warnings.warn(f"ArbConfig: {option} has no effect with {deciding}", stacklevel=3)
        overrides = (self.overrides or {}).items()
        for where, own in [
            ("", chosen),
            *((f" in overrides[{pattern!r}]", dict(own or {})) for pattern, own in overrides),
        ]:
            beside = common | own
            for option, other, value in IDLE_BESIDE:
                elsewhere = not where and any((each or {}).get(other, value) != value for _, each in overrides)
                if own.get(option) and beside[other] == value and not elsewhere:
                    shown = f'"{value}"' if isinstance(value, str) else value
                    warnings.warn(f"ArbConfig: {option}{where} has no effect with {other}={shown}", stacklevel=3)

    def _validate_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping):
            self._refuse("overrides", "a mapping from pattern to options or None")
            return
        for pattern, options in self.overrides.items():
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(f"ArbConfig: the override {pattern!r} is no pattern: pass a glob over module names")
            if options is not None:
                self._check_options(f"overrides[{pattern!r}]", options, PER_MODULE)
        self.overrides = {pattern: None if each is None else dict(each) for pattern, each in self.overrides.items()}

    def _validate_modules(self) -> None:
        if not isinstance(self.modules, dict):
            self._refuse("modules", "a mapping from module name to its options, or None")
            return
        for name, entry in self.modules.items():
            count = entry.get("salient_columns") if isinstance(entry, dict) else None
            if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"ArbConfig: modules[{name!r}] is {entry!r}; allowed: {{'salient_columns': a count}} and options"
                )
            options = {key: value for key, value in entry.items() if key != "salient_columns"}
            if options:
                self._check_options(f"modules[{name!r}]", options, FORM_OPTIONS)

    def _validate_embeddings(self) -> None:
        names = self.embeddings
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            self._refuse("embeddings", "a list of module names, or None")
        elif len(set(names)) < len(names) or set(names) & set(self.modules or ()):
            self._refuse("embeddings", "each name once, and none that is in modules")
        elif names and self.format_version < FIRST_WITH_TABLES:
            self._refuse("embeddings", f"None: format_version {self.format_version} has no int8 embeddings")

    def _check_options(self, where: str, options: Any, allowed: tuple[str, ...]) -> None:
        """Check the options of single modules as if they were those of a whole config."""
        if not isinstance(options, Mapping):
            raise ValueError(f"ArbConfig: {where} is {options!r}; allowed: a mapping of options")
        unknown = sorted(str(key) for key in options if key not in allowed)
        if unknown:
            raise ValueError(f"ArbConfig: {where} has {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        unset = [key for key, value in options.items() if value is None]
        if unset:
            raise ValueError(f"ArbConfig: {where} has {unset[0]}=None; leave out what is not to be changed")
        try:
            ArbConfig(**options, modules={})  # which are no choice, so that idle options are told of once
        except ValueError as error:
            raise ValueError(f"{error} (in {where})") from None

    def _refuse(self, option: str, allowed: str) -> None:
        shown = repr(getattr(self, option))
        shown = shown if len(shown) < 200 else shown[:200] + "..."
        raise ValueError(f"ArbConfig: {option}={shown} is not allowed; allowed: {allowed}")

    def _one_of(self, option: str, values: tuple) -> None:
        value = getattr(self, option)
        if not any(value is each or (value == each and type(value) is type(each)) for each in values):
            self._refuse(option, ", ".join(map(repr, values)))

    def _integer(self, option: str, low: int, high: int | None = None) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            self._refuse(option, f"an integer from {low}" + ("" if high is None else f" to {high}"))

    def _number(self, option: str, high: float = sys.float_info.max) -> None:
        value = getattr(self, option)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= high:
            self._refuse(option, "a finite number from 0" + ("" if high == sys.float_info.max else f" to {high:g}"))

    def options(self, name: str | None = None) -> BinarizeOptions:
        """Return the options for one matrix: those common to all modules, or with the overrides of the one named.

        Raises:
            ArbCalibrationError: two equally specific overrides cover the module.
        """
        common = BinarizeOptions.of(self)
        pattern, given = (None, None) if name is None else self.override(name)
        if pattern is None:
            return common
        chosen = dict(given or {})
        if "refinement" in chosen:
            chosen.setdefault("scale_dtype", SCALE_DTYPE[chosen["refinement"]])
        own = dataclasses.replace(common, **chosen)
        return dataclasses.replace(own, column_group_bitmap=own.column_group_bitmap and own.group_bitmap)

    def keeps(self, name: str) -> str | None:
        """The override pattern that keeps a module in full precision, or None."""
        pattern, given = self.override(name)
        return pattern if given is None else None

    def override(self, name: str) -> tuple[str | None, Mapping[str, Any] | None]:
        """The pattern in ``overrides`` that decides for a module, and what it says; None without one.

        Raises:
            ArbCalibrationError: two equally specific overrides cover the module.
        """
        overrides = self.overrides or {}
        pattern = select(overrides, name) if overrides else None
        return pattern, None if pattern is None else overrides[pattern]

    def module_entry(self, own: BinarizeOptions, salient_columns: int) -> dict[str, Any]:
        """What ``modules`` holds about a module binarized with ``own`` options: enough, with the config, to know its form."""
        common = self.options()
        different = {key: getattr(own, key) for key in FORM_OPTIONS if getattr(own, key) != getattr(common, key)}
        return {"salient_columns": salient_columns, **different}

    def form(self, name: str, out_features: int, in_features: int) -> BinaryForm:
        """The form of a binarized module, from what ``modules`` holds about it."""
        assert self.modules is not None
        entry = self.modules[name]
        options = dataclasses.replace(self.options(), **{key: entry[key] for key in FORM_OPTIONS if key in entry})
        return options.form(out_features, in_features, entry["salient_columns"])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Make a config from what :meth:`to_dict` gave, or from an untrusted ``config.json``; options of a newer version are
        left out, and those that a stored config lacks mean what they did in version 0.1.

        Raises:
            ArbFormatError: it lacks what a config has, or an option has a value that is not allowed.
        """
        version = config_dict.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:  # before options that only later versions know
            raise ArbFormatError(
                f"config.json: format_version {version} is newer than {FORMAT_VERSION}, the newest this arb_hf reads: "
                "pip install --upgrade arb_hf"
            )
        known = inspect.signature(cls).parameters
        unknown = ", ".join(sorted(str(name) for name in config_dict if name not in known and name != "quant_method"))
        if unknown:
            warnings.warn(f"ArbConfig does not know {unknown}: ignored (written by a newer arb_hf?)", stacklevel=2)
            config_dict = {
                name: value for name, value in config_dict.items() if name in known or name == "quant_method"
            }
        if config_dict.get("modules") is not None or version == 1:
            config_dict = FORMER_DEFAULTS | config_dict
            if config_dict["scale_dtype"] is None:
                raise ArbFormatError(f"config.json: scale_dtype is null; allowed: {', '.join(SCALE_DTYPES)}")
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except (ValueError, TypeError) as error:
            raise ArbFormatError(f"config.json: quantization_config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the options ready for JSON. Data and tokenizers given as objects become None: they have no name to store."""
        stored = {key: value for key, value in self.__dict__.items() if key not in SHARED and not key.startswith("_")}
        stored = copy.deepcopy(stored)
        for key in SHARED:
            value = getattr(self, key)
            stored[key] = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        return stored

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all options: one left at its default is stored too, so that a later default does not change its meaning."""
        return self.to_dict()

    def published(self, skip: list[str]) -> ArbConfig:
        """Return the config to store with the model: with the skip list that was used, without paths of the maker's computer."""
        stored = copy.deepcopy(self)
        stored.modules_to_not_convert = skip
        stored.checkpoint_dir = None
        if isinstance(stored.dataset, str | os.PathLike):
            stored.dataset = os.path.basename(stored.dataset)
        if isinstance(stored.tokenizer, str) and os.path.isdir(stored.tokenizer):
            stored.tokenizer = None
        return stored

    _adapters_known = False

    def know_adapters(self) -> None:
        """Say that the adapters to come are :mod:`arb_hf.lora`'s, which finds all layers of a packed model."""
        self._adapters_known = True

    @property
    def get_apply_tensor_subclass(self) -> None:
        """Nothing; PEFT asks a model's quantizer for this before it makes a layer with adapters, of any type.

        So it is told here that it would leave out the packed layers, where ``"all-linear"`` finds only a few that are
        dense.

        Raises:
            ValueError: the adapters come from PEFT alone.
            AttributeError: they come from :mod:`arb_hf.lora`; PEFT then goes on.
        """
        if not self._adapters_known:
            raise ValueError(
                "PEFT alone does not know packed layers: put adapters on this model with arb_hf.lora.add_lora(model, "
                "r=...), load them with arb_hf.lora.load_lora(model, path), or give PEFT arb_hf.lora.lora_config(model)"
            )
        raise AttributeError("get_apply_tensor_subclass")

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict) -> ArbConfig:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = value if key in SHARED else copy.deepcopy(value, memo)
        return new
