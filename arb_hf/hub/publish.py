"""Publishing packed models, each with its card."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
from transformers import PreTrainedModel

from ..errors import ArbUploadError
from ..folders import UNFINISHED, variant_of, weight_patterns
from .card import MARKER, model_card
from .load import load_report
from .save import README, metadata_of, require_arguments, save_pretrained, write_card

logger = logging.getLogger(__name__)


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
        private: visibility of a repository that is created.
        revision: branch to push to, created if need be; the main one by default.
        token: access token, as for huggingface_hub; by default that of ``hf auth login``.
        create_pr: whether to open a pull request instead.
        base_model: the original's name on the Hub, for the card; by default the name it was loaded by.
        kwargs: as for :func:`save_pretrained` (``max_shard_size``...).

    Everything is written to a folder of the system's temporary directory first. To choose the place, call
    :func:`save_pretrained`, then :func:`push_folder`.

    Raises:
        ArbUploadError: the upload failed; the folder with everything to push stays, and the message names it.
        ValueError: the model has no binary layers, or the Hub allows no such name.
    """
    require_arguments(repo_id, base_model, kwargs)
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
    require_arguments(repo_id, base_model, {})
    model_card(folder)  # refuses what is not a packed model, before anything is created
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        report = load_report(folder)
        write_card(folder, repo_id, base_model, metadata_of(base_model or (report.model if report else ""), api))
        keep = _readme_of_others(api, repo_id, revision)
        if keep:
            logger.warning("%s has a README.md that arb_hf did not write: kept; the new card is not pushed", repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=commit_message or "Upload a model packed by arb_hf",
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[f"{UNFINISHED}*", *([README] if keep else [])],
            delete_patterns=_older_weights(folder),  # in the same commit; what is uploaded now is not deleted
        )
    except Exception as error:  # a boundary: HTTP, sockets and files fail in many types
        raise ArbUploadError(
            f"{_cause(_origin(error), repo_id)}. Nothing is lost: the model is whole in {folder}, "
            f"which stays until you delete it. Go on with: arb-hf push {folder} {repo_id}"
        ) from error


def _older_weights(folder: str | os.PathLike) -> list[str]:
    """Patterns of the weight files that a repository may have from an earlier push, in other shards."""
    variants = {variant_of(name) for name in os.listdir(folder)} - {None}
    return [pattern for variant in sorted(map(str, variants)) for pattern in weight_patterns(variant)]


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
