"""What a user calls an adapter → a folder on this machine: his own, or the files of a Hub repository.

Knows the network and the names of the files, not what is in them. Called by ``optiq lora`` and the server.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from mlx_optiq_ext.errors import ModelNotFound
from mlx_optiq_ext.hub.explain import HUB_ERRORS, explain_hub_error
from mlx_optiq_ext.hub.fetch import hidden_bars

__all__ = ["fetch_adapter", "is_hub_id", "resolve_adapter"]

_FILES = [
    "adapter_config.json",
    "adapters.safetensors",
    "optiq/adapters.safetensors",
    "optiq_lora_config.json",
    "adapter_model.safetensors",
]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether a word reads as ``ORGANISATION/NAME``."""
    return _ID.fullmatch(source) is not None and ".." not in source


def resolve_adapter(source: str) -> Path:
    """Find or download an adapter.

    Args:
        source: A folder, or a Hub id ``ORGANISATION/NAME``. An existing folder wins.
    Raises:
        ModelNotFound: Neither, no access, no connection, or no adapter in the repository.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise ModelNotFound(
            f"no adapter folder {source}; give an existing folder, or a Hub id (ORGANISATION/NAME)"
        )
    try:
        return fetch_adapter(source)
    except ModelNotFound as error:
        if not folder.parent.is_dir():
            raise
        raise ModelNotFound(f"no adapter folder {source} here; as a Hub id: {error}") from error


def fetch_adapter(repo_id: str) -> Path:
    """Download an adapter, or find it in the cache.

    Raises:
        ModelNotFound: No such repository, no access, no connection, or no adapter in it.
    """
    try:
        with hidden_bars():
            folder = Path(snapshot_download(repo_id, allow_patterns=_FILES))
    except HUB_ERRORS as error:
        raise explain_hub_error(error, repo_id, None, kind="an adapter") from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelNotFound(f"{repo_id} has no adapter_config.json; it is no adapter of mlx-lm or PEFT")
    return folder
