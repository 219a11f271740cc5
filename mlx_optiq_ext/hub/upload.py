"""Upload a finished folder to the Hub.

``check_upload`` is cheap and comes before any long work; ``upload_folder`` comes after it. Knows nothing of
what the folder holds. Called by ``optiq convert --upload-repo``.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.hub.explain import HUB_ERRORS, TRANSFER_ERRORS, is_unreachable
from mlx_optiq_ext.hub.fetch import hidden_bars
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["check_upload", "upload_folder"]


def check_upload(repo_id: str) -> str:
    """Make sure that an upload to ``repo_id`` can work, before hours are spent on what is to be uploaded.

    Args:
        repo_id: ``OWNER/NAME``, or ``NAME`` for the own account.
    Returns:
        The full id, ``OWNER/NAME``.
    Raises:
        UsageError: Not a valid id, not logged in, a token that may only read, or someone else's namespace.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no Hub id; give OWNER/NAME") from error
    try:
        account = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UsageError(
            f"not logged in to the Hub, {repo_id} cannot be uploaded to; run `hf auth login`"
        ) from error
    except HUB_ERRORS as error:
        if is_unreachable(error):
            reason = "the Hub does not answer; check the connection, or convert without an upload"
        else:
            reason = "the Hub does not accept the token; run `hf auth login` with one that may write"
        raise UsageError(f"cannot upload to {repo_id}: {reason}") from error
    role = account.get("auth", {}).get("accessToken", {}).get("role", "write")
    if role == "read":
        raise UsageError(
            f"the token of {account['name']} may only read; run `hf auth login` with one that may write"
        )
    owner, _, name = repo_id.rpartition("/")
    owner = owner or account["name"]
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    if owner not in owners:
        raise UsageError(
            f"{account['name']} cannot write to {owner}/…; upload to one of: {', '.join(owners)}"
        )
    return f"{owner}/{name}"


def upload_folder(
    folder: Path, repo_id: str, *, private: bool = False, progress: ProgressSink = ignore_progress
) -> str:
    """Create the repository where it is missing and upload a folder to it in one commit.

    Args:
        folder: What to upload; everything in it.
        repo_id: From :func:`check_upload`.
        private: Make a new repository private; an existing one keeps what it is.
        progress: One event before and one after.
    Returns:
        Address of the commit.
    Raises:
        OptiqError: The upload failed; the folder is untouched, and the message has the command to try again.
    """
    num_files = sum(path.is_file() for path in folder.rglob("*"))
    progress(Progress(stage="upload", done=0, total=num_files, detail=repo_id))
    api = HfApi()
    try:
        with hidden_bars():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload a mixed-precision MLX checkpoint"
            )
    except TRANSFER_ERRORS as error:
        raise OptiqError(
            f"the upload to {repo_id} failed ({type(error).__name__}: {error}); {folder} is complete, try"
            f" again with `hf upload {repo_id} {folder}`"
        ) from error
    progress(Progress(stage="upload", done=num_files, total=num_files, detail=repo_id))
    return str(commit.commit_url)
