"""A classifier's way to the Hub: model, tokenizer, card and record in one commit, or nothing at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .. import SpinForSequenceClassification
from .card import CARD, EVALUATION, PICTURE, RECORD, card_text, is_as_written, named_base_model, write_card
from .folder import Checkpoint, Form, is_weight_file


class PushError(RuntimeError):
    """A classifier could not be pushed; the repository's files are as they were. A new one may be there, and empty."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload SPIN classifier",
    form: Form | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> CommitInfo:
    """Upload a saved classifier with its tokenizer, card and record, in one commit.

    The folder is looked at first; a card is written where there is none. A card that nobody edited names the repository
    in what goes up. Files of the folder that could hold a pickle stay behind, as do subfolders, and a path of this
    machine in the config. Weights and code that an earlier push left in the repository go in the same commit, so that
    nobody loads the old with the new.

    Args:
        folder: of ``model.save_pretrained`` and ``tokenizer.save_pretrained``.
        repo_id: ``"you/name"``, or ``"name"`` for your own; made if it does not exist.
        private: whether a new repository is private; by default as your account says.
        revision: a branch, made if it does not exist.
        message: of the commit.
        form: save the classifier in this form first (in a temporary place); by default it goes up as it is.
        token: of the Hub; by default ``HF_TOKEN`` or that of ``hf auth login``.
        trust_remote_code: with ``form``, for a backbone whose code lies in a repository.

    Returns:
        The client's record of the commit, with its ``commit_url`` and ``oid``.

    Raises:
        CheckpointError: if the folder holds no whole classifier with its tokenizer.
        CardError: if a card is missing and there is no ``calibration.json`` to write it from.
        PushError: without a token or rights, for a name the Hub refuses, or where it can't be reached.
    """
    checkpoint = Checkpoint.read(folder)
    checkpoint.uploads()  # its errors come before any work
    _check_name(repo_id)
    token = token or get_token()
    if token is None:
        raise PushError(
            "No token for the Hub was found. Make one with write access at "
            f"{constants.ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    if not (checkpoint.folder / CARD).is_file():
        write_card(checkpoint.folder)
    untouched = is_as_written(checkpoint)
    with tempfile.TemporaryDirectory(prefix="spin_hf_") as scratch:
        if form is not None and form != checkpoint.form:
            checkpoint = _saved_as(form, checkpoint, Path(scratch), trust_remote_code)
        config = _shareable_config(checkpoint)
        with _told_plainly(repo_id) as remarks:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            names = checkpoint.uploads()
            present = api.model_info(repo_id, revision=revision).siblings or []
            if {file.rfilename for file in present} <= {".gitattributes"}:
                page = f"{constants.ENDPOINT}/{repo_id}/settings"
                remarks.append(f"{repo_id} is there now, and empty: push again, or delete it at {page}.")
            stale = [
                file.rfilename
                for file in present
                if "/" not in file.rfilename
                and file.rfilename not in names
                and (is_weight_file(file.rfilename) or file.rfilename.endswith(".py"))
            ]
            contents: dict[str, Any] = {name: str(checkpoint.folder / name) for name in names}
            contents["config.json"] = config
            if untouched:
                contents[CARD] = card_text(checkpoint, model_id=repo_id).encode()
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, content) for name, content in contents.items()),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=message,
                revision=revision,
            )


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(
            f'{repo_id!r} is no name for a repository ({error}). One reads like "you/my-classifier".'
        ) from None


def _saved_as(form: Form, checkpoint: Checkpoint, scratch: Path, trust_remote_code: bool) -> Checkpoint:
    """The classifier in another form, in a folder of the same name."""
    from transformers import AutoTokenizer

    folder = scratch / checkpoint.folder.resolve().name
    model = SpinForSequenceClassification.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    if checkpoint.config.get("backbone_id") != (named := named_base_model(checkpoint)) and named:
        model.config.backbone_id = named
    model.save_pretrained(folder, form=form)
    AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(folder)
    for name in (CARD, PICTURE, RECORD, EVALUATION):
        if (checkpoint.folder / name).is_file():
            shutil.copy(checkpoint.folder / name, folder / name)
    return Checkpoint.read(folder)


def _shareable_config(checkpoint: Checkpoint) -> bytes:
    """``config.json`` with the backbone's Hub id, and without any path of this machine."""
    named = named_base_model(checkpoint)
    nested = dict(checkpoint.config.get("backbone_config") or {})
    if named is None and (checkpoint.form == "head" or nested.get("auto_map")):
        raise PushError(
            f"{checkpoint.folder} needs its backbone to be loaded, and that came from a place that nobody else has: "
            f"{checkpoint.config.get('backbone_id')}. Name its Hub id with write_card(..., base_model=...), or push "
            "another form."
        )
    nested.pop("_name_or_path", None)
    config = {**checkpoint.config, "backbone_id": named, "backbone_config": nested}
    config.pop("_name_or_path", None)
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()


@contextmanager
def _told_plainly(repo_id: str) -> Iterator[list[str]]:
    """Turn what the Hub or the wire answers into one line that says what to do, with the remarks made meanwhile."""
    remarks: list[str] = []
    try:
        with _answers_told(repo_id):
            yield remarks
    except PushError as error:
        raise PushError(" ".join([str(error), *remarks])) from error.__cause__


@contextmanager
def _answers_told(repo_id: str) -> Iterator[None]:
    where = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled:
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it and try again.") from None
    except HfHubHTTPError as error:
        raise PushError(_answer(error, repo_id, where)) from error
    except HTTPError as error:
        raise PushError(f"{where} can't be reached ({error}). Check the network and push again.") from error
    except RuntimeError as error:  # of one file's upload, or of Xet
        if isinstance(error.__cause__, HfHubHTTPError):
            raise PushError(_answer(error.__cause__, repo_id, where)) from error
        raise PushError(f"The upload to {where} broke off: {error.__cause__ or error}. Push again.") from error
    except ValueError as error:
        raise PushError(f"{where} does not take this: {error}") from error


def _answer(error: HfHubHTTPError, repo_id: str, where: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f"{where} does not accept the token (401). Make a new one at {where}/settings/tokens, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403). Use a token with write access, of a member of "
            f"{repo_id.partition('/')[0]} if that is an organisation."
        )
    if status == 404:
        return f"{repo_id} was not found at {where} (404). Check its name, and that the token may see it."
    return f"{where} answered with {status}: {error.server_message or error}. Nothing was committed."
