"""Bring a Hub repository into the Hugging Face cache: list, check the disk, download what mlx-lm reads.

Knows nothing of folders a user names (``resolve`` does). Files that are complete in the cache are kept, so
a stopped download goes on where it was. Called by ``resolve``.
"""

import contextlib
import queue
import shutil
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import msgspec
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from mlx_optiq_ext.errors import ModelNotFound, ResourceError
from mlx_optiq_ext.hub.explain import HUB_ERRORS, TRANSFER_ERRORS, explain_hub_error, is_unreachable
from mlx_optiq_ext.types.progress import Progress, ProgressSink

__all__ = ["RemoteFile", "RemoteModel", "fetch_files", "fetch_listing", "find_cached", "hidden_bars"]

_TIMEOUT_S = 15.0
_POLL_S = 0.5
_NUM_WORKERS = 4
_PATTERNS = (
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "tokenizer.model",
    "tiktoken.model",
    "README.md",
    "model*.safetensors",
)
_MEGABYTE = 1_000_000


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a repository."""

    name: str
    nbytes: int
    blob: str
    """Name of its content in the cache."""


class RemoteModel(msgspec.Struct, frozen=True, kw_only=True):
    """A repository at one commit, reduced to what mlx-lm reads."""

    repo_id: str
    revision: str
    """Branch, tag or commit as asked for."""
    commit: str
    files: tuple[RemoteFile, ...]


def fetch_listing(repo_id: str, revision: str | None, *, with_code: bool = False) -> RemoteModel:
    """Ask the Hub which commit a revision is and which of its files are needed.

    Args:
        repo_id: ``ORGANISATION/NAME``.
        revision: Branch, tag or commit; None is the default branch.
        with_code: Also take Python files.
    Returns:
        The listing; nothing is downloaded.
    Raises:
        ModelNotFound: The repository holds no model in a usable format.
        Exception: Any of :data:`~mlx_optiq_ext.hub.explain.HUB_ERRORS`; the caller explains it.
    """
    api = HfApi()
    info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    if info.gated:
        api.auth_check(repo_id)
    patterns = (*_PATTERNS, "*.py") if with_code else _PATTERNS
    siblings = info.siblings or []
    files = tuple(
        RemoteFile(
            name=entry.rfilename,
            nbytes=entry.size or 0,
            blob=(entry.lfs.sha256 if entry.lfs else entry.blob_id) or "",
        )
        for entry in siblings
        if "/" not in entry.rfilename and any(fnmatch(entry.rfilename, pattern) for pattern in patterns)
    )
    _require_usable(repo_id, [entry.rfilename for entry in siblings])
    return RemoteModel(
        repo_id=repo_id, revision=revision or constants.DEFAULT_REVISION, commit=info.sha or "", files=files
    )


def fetch_files(remote: RemoteModel, *, progress: ProgressSink) -> Path:
    """Download the files that the cache lacks.

    Args:
        remote: From :func:`fetch_listing`.
        progress: Events in megabytes, about two a second.
    Returns:
        The folder of this commit in the cache.
    Raises:
        ResourceError: The disk of the cache has no room; checked before anything is downloaded.
        ModelNotFound: A file could not be read, or the connection broke.
    """
    cache = _repository_cache(remote.repo_id)
    missing = [file for file in remote.files if not (cache / "blobs" / file.blob).is_file()]
    _require_room(remote, sum(file.nbytes for file in missing))
    with hidden_bars():
        _download(remote, cache, progress)
    _remember_revision(remote, cache)
    return cache / "snapshots" / remote.commit


def find_cached(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache, with no network; None where there is none.

    The folder may lack files of a stopped download: check it like any other folder.
    """
    try:
        found = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except HUB_ERRORS:
        return None
    return Path(found)


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """Keep huggingface-hub from drawing its own progress bars inside the block."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _require_usable(repo_id: str, names: list[str]) -> None:
    """Refuse a repository without config.json or safetensors, and name what it holds instead."""
    has_config = "config.json" in names
    if has_config and any(fnmatch(name, "model*.safetensors") for name in names):
        return
    if any(name.lower().endswith(".gguf") for name in names):
        hint = "it holds GGUF files: download one and run `optiq import-gguf FILE -o DIR`"
    elif has_config and any(fnmatch(name, "pytorch_model*.bin") for name in names):
        hint = "it holds PyTorch weights only: take a revision or a copy with safetensors"
    elif any(fnmatch(name, "adapter_model*") for name in names):
        hint = "it holds an adapter: give the base model, or fuse the adapter first with `mlx_lm.fuse`"
    else:
        hint = "it is no language model in Hugging Face or MLX format"
    missing = "model*.safetensors" if has_config else "config.json"
    raise ModelNotFound(f"{repo_id} has no {missing}; {hint}")


def _repository_cache(repo_id: str) -> Path:
    """Folder of one repository in the cache (layout documented by huggingface-hub)."""
    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"


def _require_room(remote: RemoteModel, needed_nbytes: int) -> None:
    folder = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_nbytes > free:
        raise ResourceError(
            f"downloading {remote.repo_id} needs {needed_nbytes / 1e9:.2f} GB, the cache {folder} has"
            f" {free / 1e9:.2f} GB free; free some, or set HF_HOME to a larger disk"
        )


def _remember_revision(remote: RemoteModel, cache: Path) -> None:
    """Note which commit a branch or tag is, as the cache's layout has it, so that it is found offline."""
    if remote.revision == remote.commit:
        return
    reference = cache / "refs" / remote.revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(remote.commit)


def _download(remote: RemoteModel, cache: Path, progress: ProgressSink) -> None:
    """Download the small files, then the weights: a stopped download knows which weights it lacks."""
    weights = [file for file in remote.files if file.name.endswith(".safetensors")]
    for group in ([file for file in remote.files if file not in weights], weights):
        _download_group(remote, group, cache, progress)


def _download_group(
    remote: RemoteModel, group: list[RemoteFile], cache: Path, progress: ProgressSink
) -> None:
    """Run the workers and report bytes until the last file is there.

    Workers are daemons, so that an interrupt ends the program at once; what they finished stays.
    """
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    for file in group:
        waiting.put(file)
    failures: list[Exception] = []
    threads = [
        threading.Thread(target=_work, args=(remote, waiting, failures), daemon=True)
        for _ in range(min(_NUM_WORKERS, len(group)))
    ]
    for thread in threads:
        thread.start()
    while (busy := [thread for thread in threads if thread.is_alive()]) and not failures:
        _report(remote, cache, progress)
        busy[0].join(_POLL_S)
    if failures and is_unreachable(failures[0]):
        reason = type(failures[0]).__name__
        raise ModelNotFound(
            f"the download of {remote.repo_id} broke off ({reason}); run again to go on with what is missing"
        ) from failures[0]
    if failures:
        raise explain_hub_error(failures[0], remote.repo_id, remote.commit) from failures[0]
    _report(remote, cache, progress)


def _work(remote: RemoteModel, waiting: "queue.SimpleQueue[RemoteFile]", failures: list[Exception]) -> None:
    """Download files until none waits or one failed; runs in its own thread."""
    while not failures:
        try:
            file = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            hf_hub_download(remote.repo_id, file.name, revision=remote.commit, etag_timeout=_TIMEOUT_S)
        except TRANSFER_ERRORS as error:
            failures.append(error)


def _report(remote: RemoteModel, cache: Path, progress: ProgressSink) -> None:
    blobs = cache / "blobs"
    total_nbytes = sum(file.nbytes for file in remote.files)
    present = sum(file.nbytes for file in remote.files if (blobs / file.blob).is_file())
    for partial in blobs.glob("*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            present += partial.stat().st_blocks * 512
    progress(
        Progress(
            stage="download",
            done=min(present, total_nbytes) // _MEGABYTE,
            total=max(total_nbytes // _MEGABYTE, 1),
            detail=f"MB, {remote.repo_id}",
        )
    )
