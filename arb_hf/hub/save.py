"""Saving a packed model with its record and card, so that it loads again or nothing is written."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel

from ..folders import replaced, require_place
from ..format.headers import REPORT_FILE
from ..names import is_hub_id
from ..nn import binary_modules
from ..nn.offloaded import files_on_disk
from ..nn.swap import require_plain
from .card import PLOT_FILE, model_card, written_by_us
from .load import load_report

logger = logging.getLogger(__name__)
README = "README.md"
# Arguments of `save_pretrained` that are for other models, and what to do instead.
REFUSED = {
    "state_dict": "a packed model is saved as it is; transformers too would ignore this",
    "safe_serialization": "packed models are safetensors files",
    "push_to_hub": "call arb_hf.push_to_hub(model, tokenizer, repo_id)",
    "distributed_checkpoint": "packed models are not split over processes",
}
UNUSED = {"safe_serialization": True}  # the values that say what is done anyhow; False for the others
ACCEPTED = ("max_shard_size", "variant", "is_main_process", "save_original_format")


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_model: str | None = None,
    **kwargs: Any,
) -> None:
    """Write a packed model with all that belongs to it: tokenizer, record of the run, plot, model card.

    A model that was there before is replaced as a whole: everything is written beside it first, and if that fails the
    old one stays.

    Args:
        tokenizer: also written; None for none.
        folder: created if need be. A README.md there that was edited by hand stays.
        repo_id: name under which the model will be published, for the card.
        base_model: the original's name on the Hub, for the card; by default the name it was loaded by.
        kwargs: for ``model.save_pretrained``: ``max_shard_size``, ``variant``, ``is_main_process``.

    Raises:
        ValueError: the model has no binary layers, or is more than a packed model (scales being trained, adapters), or
            would not load again; ``folder`` holds an adapter; an argument makes no sense or has no effect here. Nothing
            is written then.
        OSError: ``folder`` cannot be written.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # torch.compile's, DistributedDataParallel's
    require_arguments(repo_id, base_model, kwargs)
    options = {name: value for name, value in kwargs.items() if name in ACCEPTED}
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}: pass the tokenizer itself, or None")
    _require_packed(model, folder)
    report = getattr(model, "arb_report", None) or load_report(model.name_or_path or "", local_files_only=True)
    metadata = metadata_of(report.model if report else "")
    if not options.get("is_main_process", True):
        return
    with replaced(folder, also=(REPORT_FILE,) if report else (REPORT_FILE, PLOT_FILE)) as staged:
        model.save_pretrained(staged, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if report is not None:
            config = model.config.quantization_config
            report.published(config if isinstance(config, dict) else config.to_dict()).to_json(staged / REPORT_FILE)
    write_card(folder, repo_id, base_model, metadata)


def _require_packed(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Refuse what cannot be saved to ``folder`` as a packed model; ``model.save_pretrained`` checks the tensors."""
    require_plain(model)
    if not binary_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no binary layers: load it with quantization_config=ArbConfig(...)"
        )
    if getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"{type(model).__name__} was neither made nor loaded by arb_hf: its config does not say so")
    require_place(folder)
    home = os.path.realpath(folder)
    if any(os.path.dirname(os.path.realpath(file)) == home for file in files_on_disk(model)):
        raise ValueError(
            f"layers of this model are on disk, in the files of {folder} itself: save it to another folder"
        )


def require_arguments(repo_id: str | None, base_model: str | None, options: dict[str, Any]) -> None:
    """Refuse arguments of saving that make no sense or have no effect, before any work is done.

    Args:
        repo_id, base_model: as for :func:`save_pretrained`.
        options: the further arguments.

    Raises:
        TypeError: there is no such argument.
        ValueError: one has no effect on a packed model, or its value makes no sense.
    """
    for name, value in (("repo_id", repo_id), ("base_model", base_model)):
        if value is not None:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(f"{name}={value!r} is no name on the Hub: {error}") from error
    for name, value in options.items():
        if name in REFUSED and value is not None and value != UNUSED.get(name, False):
            raise ValueError(f"{name}={value!r:.40} is not possible: {REFUSED[name]}")
        if name not in REFUSED and name not in ACCEPTED:
            raise TypeError(f"save_pretrained has no argument {name!r}")
    size = options.get("max_shard_size", 1)
    written = isinstance(size, str) and re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", size, re.IGNORECASE)
    if not (float(written[1]) > 0 if written else type(size) is int and size > 0):
        raise ValueError(f"max_shard_size={size!r} is no size: pass bytes, or a string like '5GB' (KB, MB, GB, TB)")
    variant = options.get("variant")
    if variant is not None and not re.fullmatch(r"\w[\w-]*", str(variant)):
        raise ValueError(f"variant={variant!r} cannot be a part of a file's name: use letters, digits, - and _")


def write_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> bool:
    """Write README.md and the plot of a packed model's folder; False, and nothing is done, if it was edited by hand.

    Args:
        repo_id, base_model: as for :func:`save_pretrained`.
        metadata: metadata of the original's card, for licence and languages.

    What an earlier card in the folder names and this call does not is kept: the original, its licence, languages.

    Raises:
        ValueError: the folder holds no packed model.
    """
    folder = Path(folder)
    readme = folder / README
    if not written_by_us(readme):
        logger.warning("%s was edited by hand: kept as it is", readme)
        return False
    report = load_report(folder)
    if report is not None:
        try:
            report.plot(folder / PLOT_FILE)
        except ImportError:
            logger.info("no plot in the model card: matplotlib is not installed")
    earlier = metadata_of(folder) if readme.exists() else {}
    if earlier.get("base_model_relation"):  # without it, what is named is not the original itself
        base_model = base_model or earlier["base_model"]
    unfinished = folder / f"{README}.unfinished"
    unfinished.write_text(str(model_card(folder, repo_id, base_model, earlier | (metadata or {}))), encoding="utf-8")
    unfinished.replace(readme)
    return True


def metadata_of(model_id: str | os.PathLike, api: HfApi | None = None) -> dict[str, Any]:
    """The metadata of a model's card, in a folder or the cache, with ``api`` on the Hub; nothing where it has none."""
    readme = Path(model_id) / README
    try:
        if not readme.is_file():
            if not is_hub_id(str(model_id)):
                return {}
            readme = Path((api or HfApi()).hf_hub_download(str(model_id), README, local_files_only=api is None))
        return ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # the new card is worth having without it
        logger.info("no card of %s: %s", model_id, error)
        return {}
