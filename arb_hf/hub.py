"""Saving, publishing and checked loading of packed models."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from .card import MARKER, PLOT_FILE, is_hub_id, model_card, written_by_us
from .checks import check_counts, read_entries
from .config import QUANT_METHOD, ArbConfig
from .errors import ArbFormatError, ArbUploadError
from .format.headers import INDEX, REPORT_FILE, read_json, shard_names
from .nn import binary_modules
from .nn.scaled import require_frozen
from .report import ArbReport

logger = logging.getLogger(__name__)
README = "README.md"

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
        check_counts(config.to_dict(), read_entries(_weight_files(model_id, **hub_arguments), model_id))
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
    names = ["model.safetensors"] if index is None else shard_names(read_json(Path(index)))
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


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_model: str | None = None,
    **kwargs: Any,
) -> None:
    """Write a packed model with all that belongs to it: tokenizer, record of the run, plot, model card.

    Args:
        tokenizer: also written; None for none.
        folder: created if need be. A README.md there that was edited by hand stays.
        repo_id: under which the model will be published, for the card.
        base_model: the original's name on the Hub, for the card; by default the name it was loaded by.
        kwargs: for ``model.save_pretrained`` (``max_shard_size``...).

    Raises:
        ValueError: the model has no binary layers, or their scales are being trained.
    """
    require_frozen(model)
    if not binary_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no binary layers: load it with quantization_config=ArbConfig(...)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = getattr(model, "arb_report", None) or load_report(model.name_or_path or "", local_files_only=True)
    if report is not None:
        _publishable(report, model).to_json(folder / REPORT_FILE)
    write_card(folder, repo_id, base_model, _metadata(report.model if report else ""))


def write_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> bool:
    """Write README.md and the plot of a packed model's folder; False, and nothing is done, if it was edited by hand.

    Args:
        repo_id, base_model: as for :func:`save_pretrained`.
        metadata: of the original's card, for licence and languages.

    What an earlier card here names, and this call does not, stays: the original, its licence, languages.

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
    earlier = _metadata(folder) if readme.exists() else {}
    base_model = base_model or earlier.get("base_model")
    readme.write_text(str(model_card(folder, repo_id, base_model, earlier | (metadata or {}))), encoding="utf-8")
    return True


def push_to_hub(
    model: PreTrainedModel,
    tokenizer: Any,
    repo_id: str,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Publish a packed model with its tokenizer, record and model card, in one commit.

    Args:
        repo_id: ``"owner/name"`` or ``"name"``; created if it does not exist.
        private: of a repository that is created.
        revision: branch to push to, created if need be; the main one by default.
        token: as for huggingface_hub; by default the one of ``hf auth login``.
        create_pr: open a pull request instead.
        base_model: the original's name on the Hub, for the card; by default the name it was loaded by.
        kwargs: for ``model.save_pretrained`` (``max_shard_size``...).

    All is written to a folder of the system's temporary directory first. To choose the place, use
    :func:`save_pretrained` and :func:`push_folder`.

    Raises:
        ArbUploadError: the upload failed; the folder with everything to push stays, and the message names it.
        ValueError: the model has no binary layers, or the Hub allows no such name.
    """
    validate_repo_id(repo_id)
    folder = tempfile.mkdtemp(prefix="arb_hf-push-")
    try:
        save_pretrained(model, tokenizer, folder, repo_id, base_model, **kwargs)
    except BaseException:
        shutil.rmtree(folder)
        raise
    commit = push_folder(folder, repo_id, private, commit_message, revision, token, create_pr, base_model)
    shutil.rmtree(folder)
    return commit


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
) -> CommitInfo:
    """Publish the folder of a packed model; arguments and errors as for :func:`push_to_hub`.

    The card is written anew, and a README that was edited by hand is kept: in the folder, and in the repository.
    """
    validate_repo_id(repo_id)
    model_card(folder)  # refuses what is not a packed model, before anything is created
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        report = load_report(folder)
        write_card(folder, repo_id, base_model, _metadata(base_model or (report.model if report else ""), api))
        keep = _readme_of_others(api, repo_id, revision)
        if keep:
            logger.warning("%s has a README.md that arb_hf did not write: kept; the new card is not pushed", repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=commit_message or "Upload a model packed by arb_hf",
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[README] if keep else None,
        )
    except Exception as error:  # a boundary: HTTP, sockets and files fail in many types
        raise ArbUploadError(
            f"{_cause(_origin(error), repo_id)}. Nothing is lost: the model is whole in {folder}, "
            f"which stays until you delete it. Go on with: arb-hf push {folder} {repo_id}"
        ) from error


def _origin(error: BaseException) -> BaseException:
    """The Hub's answer, where huggingface_hub wrapped it in an error of its own; else the error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HfHubHTTPError):
        found = found.__cause__
    return error if found is None else found


def _cause(error: BaseException, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, GatedRepoError) or status == 403:
        return f"this token may not write to {repo_id} (403): use a token with write access, or a name of your own"
    if status == 401:
        return f"the Hub refused the token (401) for {repo_id}: log in with `hf auth login`, or pass token="
    if status == 404:
        return f"the Hub knows no {repo_id} (404), or does not show it to this token: check owner, name and revision"
    if status == 409:
        return f"{repo_id} is being changed by someone else (409): {said}"
    if status is not None and status >= 500:
        return f"the Hub failed ({status}) while {repo_id} was pushed: try again later"
    if status is not None:
        return f"the Hub refused the push to {repo_id} ({status}): {said}"
    return f"the push to {repo_id} broke off ({type(error).__name__}: {said})"


def _readme_of_others(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Does the repository have a README.md that is not one of our cards?"""
    try:
        path = api.hf_hub_download(repo_id, README, revision=revision)
    except EntryNotFoundError:
        return False
    return MARKER not in Path(path).read_text(encoding="utf-8", errors="replace")


def _metadata(model_id: str | os.PathLike, api: HfApi | None = None) -> dict[str, Any]:
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


def _publishable(report: ArbReport, model: PreTrainedModel) -> ArbReport:
    """The report without anything of the maker's file system."""
    report = copy.copy(report)
    config = model.config.quantization_config
    stored = config if isinstance(config, dict) else config.to_dict()
    report.config = {key: value for key, value in stored.items() if key != "modules"}
    if not is_hub_id(report.model):
        report.model = os.path.basename(os.path.normpath(report.model))
    return report
