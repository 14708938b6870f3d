"""Saving and publishing packed models, each with its card."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..errors import ArbUploadError
from ..format.headers import REPORT_FILE
from ..names import is_hub_id
from ..nn import binary_modules
from ..nn.scaled import require_frozen
from .card import MARKER, PLOT_FILE, model_card, written_by_us
from .load import load_report

logger = logging.getLogger(__name__)
README = "README.md"


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
        config = model.config.quantization_config
        report.published(config if isinstance(config, dict) else config.to_dict()).to_json(folder / REPORT_FILE)
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
