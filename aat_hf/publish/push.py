"""Sending a finished folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from aat_hf.publish.errors import PublishError


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository if it does not exist, and upload the folder in one commit.

    Args:
        folder: A finished repository.
        repository: "owner/name".
        private: Of a repository that is created.

    Returns:
        The address of the commit.

    Raises:
        PublishError: The Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    refusals = errors.HTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError  # type: ignore[attr-defined]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Publish {folder.name}")
    except refusals as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PublishError(
            f"{repository} was not pushed ({first}): check the name and the network, and log in with a token that "
            f"may write (hf auth login); {folder} is finished: hf upload {repository} {folder}"
        ) from error
    return str(commit.commit_url)
