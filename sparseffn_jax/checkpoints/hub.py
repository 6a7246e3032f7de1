"""Pushes folders of models and adapters to the Hugging Face Hub."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from sparseffn_jax.checkpoints.adapters import ADAPTER_CONFIG
from sparseffn_jax.checkpoints.cards import model_card, origin_of
from sparseffn_jax.checkpoints.errors import CheckpointError, one_line
from sparseffn_jax.checkpoints.folders import CARD, TOKENIZER_FILES, PathLike
from sparseffn_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained


def push_to_hub(
    source: PathLike | Pretrained,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Uploads a model, or LoRA adapters, to a repository on the Hugging Face Hub.

    Of a folder the files that lie right in it are uploaded, but for hidden ones, in one commit; a
    repository that is there keeps its other files. A model's folder without ``README.md`` gets one,
    a model card.

    Args:
      source: a folder that :func:`save_pretrained`, :func:`save_adapter` or a command has written,
        or a model that was loaded, which is written to a temporary folder.
      repo_id: the repository, ``"name"`` or ``"organisation/name"``, which is made if need be.
      private: whether a repository that is made is private; ``None`` takes its owner's default.
      token: an access token that may write; ``None`` takes the one that one is logged in with.

    Returns:
      The address of the commit.

    Raises:
      CheckpointError: if the folder is not a model's or an adapter's, if nobody is logged in or may
        not write to that repository, or if the Hub cannot be reached.

    Example:
      >>> import sparseffn_jax as sf
      >>> try:
      ...     sf.push_to_hub("no/such/folder", "me/sparse-gpt2")
      ... except sf.CheckpointError as error:
      ...     print(error)
      no/such/folder is not a folder: give one that holds a model or an adapter
    """
    if isinstance(source, Pretrained):
        check_push(repo_id, token)
        with tempfile.TemporaryDirectory() as made:
            folder, model, read = Path(made) / "model", source.model(), source.folder
            has_tokenizer = read and any((read / name).is_file() for name in TOKENIZER_FILES)
            origin = read and origin_of(read, read)
            save_pretrained(
                folder,
                model,
                source.params,
                tokenizer=read if has_tokenizer else None,
                card=model_card(repo_id, model, source.params, origin),
            )
            return _push(folder, repo_id, private, token)
    folder = Path(source).expanduser()
    _own_files(folder)
    check_push(repo_id, token)
    if not any((folder / name).exists() for name in (CARD, ADAPTER_CONFIG)):
        pretrained = load_pretrained(folder, on_demand=True, param_dtype=None)
        card = model_card(repo_id, pretrained.model(), pretrained.params)
        (folder / CARD).write_text(card, encoding="utf-8")
    return _push(folder, repo_id, private, token)


def check_push(repo_id: str, token: str | None = None) -> None:
    """Checks that one is logged in and may write to a repository, before the work that it is for.

    Args:
      repo_id: the repository; it need not exist.
      token: an access token; ``None`` takes the one that one is logged in with.

    Raises:
      CheckpointError: if not, or if the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise CheckpointError(
            f"{repo_id!r} cannot be the name of a repository: {one_line(error)}"
        ) from error
    try:
        user = HfApi(token=token).whoami()
    except Exception as error:
        raise CheckpointError(
            f"cannot push to {repo_id}: the Hugging Face Hub does not know who you are "
            f"({one_line(error)}). Log in with: hf auth login, or set HF_TOKEN, with a token that "
            "may write"
        ) from error
    if _role(user) == "read":
        raise CheckpointError(
            f"cannot push to {repo_id}: the token of {user['name']} may only read; make one that "
            "may write at https://huggingface.co/settings/tokens"
        )
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
    if "/" in repo_id and repo_id.partition("/")[0] not in owners:
        raise CheckpointError(
            f"cannot push to {repo_id}: {user['name']} may write to {', '.join(owners)} alone"
        )


def _push(folder: Path, repo_id: str, private: bool | None, token: str | None) -> str:
    operations = [CommitOperationAdd(file.name, os.fspath(file)) for file in _own_files(folder)]
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo.repo_id, operations, commit_message="Upload with sparseffn_jax"
        )
    # What huggingface_hub and the library under it raise differs from version to version.
    except Exception as error:
        raise CheckpointError(f"{folder} was not pushed to {repo_id}: {one_line(error)}") from error
    return commit.commit_url


def _role(user: Mapping[str, Any]) -> str | None:
    """Returns what the token that has told who a user is may do: read, write or fineGrained."""
    return ((user.get("auth") or {}).get("accessToken") or {}).get("role")


def _own_files(folder: Path) -> list[Path]:
    """Returns the files right in a folder that are not hidden.

    Raises:
      CheckpointError: if the folder is not a model's or an adapter's, or a file in it is a link to
        one elsewhere.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give one that holds a model or an adapter"
        )
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise CheckpointError(
            f"{folder} has neither config.json nor {ADAPTER_CONFIG}: give the folder of a model or "
            "of an adapter"
        )
    files = sorted(file for file in folder.iterdir() if file.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if links := [file.name for file in files if file.resolve().parent != folder.resolve()]:
        raise CheckpointError(
            f"{folder} has {links[0]} as a link to a file elsewhere: only what lies in the folder "
            "is pushed; copy it there first"
        )
    return files
