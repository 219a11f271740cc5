"""Adapter folders on the Hub: the files of one repository that an adapter consists of.

Knows the network, not what is in the files. Called by the server.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from mlx_optiq_ext.errors import ModelNotFound
from mlx_optiq_ext.hub.explain import HUB_ERRORS, explain_hub_error
from mlx_optiq_ext.hub.fetch import hidden_bars

__all__ = ["fetch_adapter", "is_hub_id"]

_FILES = ["adapter_config.json", "*.safetensors", "optiq/*", "optiq_lora_config.json"]
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether a word reads as ``ORGANISATION/NAME``."""
    return _ID.fullmatch(source) is not None and ".." not in source


def fetch_adapter(repo_id: str) -> Path:
    """Download an adapter, or find it in the cache.

    Raises:
        ModelNotFound: No such repository, no access, no connection, or no adapter in it.
    """
    try:
        with hidden_bars():
            folder = Path(snapshot_download(repo_id, allow_patterns=_FILES))
    except HUB_ERRORS as error:
        raise explain_hub_error(error, repo_id, None) from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelNotFound(f"{repo_id} has no adapter_config.json; it is no adapter")
    return folder
