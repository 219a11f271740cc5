"""Look for models: on the Hub by words, or in the cache of this machine.

Downloads no weights. Called by the dashboard.
"""

import json
from typing import Any

import msgspec
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from mlx_optiq_ext.errors import ModelNotFound
from mlx_optiq_ext.hub.explain import HUB_ERRORS, explain_hub_error, is_unreachable
from mlx_optiq_ext.hub.fetch import hidden_bars

__all__ = ["FoundModel", "cached_models", "fetch_config", "search_models"]

_WANTED = ("text-generation", "safetensors")
_FACTS = ["downloads", "gated", "safetensors"]
_TIMEOUT_S = 10.0


class FoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """One repository."""

    repo_id: str
    numel: int = 0
    """Weights of the model; 0 where the Hub does not say."""
    downloads: int = 0
    """In the last month; 0 for a copy in the cache."""
    is_gated: bool = False
    """Access must be asked for."""
    is_cached: bool = False


class _Weights(msgspec.Struct, frozen=True):
    total: int = 0


class _Entry(msgspec.Struct, frozen=True):
    """What the Hub says of a model; other fields are skipped."""

    id: str
    downloads: int = 0
    gated: bool | str = False
    safetensors: _Weights | None = None


def search_models(words: str, limit: int = 20) -> tuple[FoundModel, ...]:
    """Ask the Hub for language models with safetensors weights, the most downloaded first.

    Args:
        words: Parts of the name.
        limit: Most that are wanted.
    Raises:
        ModelNotFound: The Hub does not answer, or refuses; says what works without it.
    """
    asked: dict[str, Any] = {
        "search": words,
        "limit": limit,
        "sort": "downloads",
        "filter": list(_WANTED),
        "expand": _FACTS,
    }
    try:
        # HfApi.list_models asks again and again where nobody answers; a search must say so at once.
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models", params=asked, headers=build_hf_headers(), timeout=_TIMEOUT_S
        )
        hf_raise_for_status(answer)
        found = msgspec.json.decode(answer.content, type=tuple[_Entry, ...])
    except HUB_ERRORS as error:
        if is_unreachable(error):
            raise ModelNotFound(
                f"the Hub does not answer ({type(error).__name__}); models in the cache and in folders can "
                "be used without it"
            ) from error
        raise ModelNotFound(f"the Hub cannot be searched for {words!r}: {error}") from error
    except msgspec.MsgspecError as error:
        raise ModelNotFound(f"what answers at {constants.ENDPOINT} is no Hub ({error})") from error
    return tuple(
        FoundModel(
            repo_id=entry.id,
            numel=entry.safetensors.total if entry.safetensors else 0,
            downloads=entry.downloads,
            is_gated=bool(entry.gated),
        )
        for entry in found
    )


def cached_models() -> tuple[FoundModel, ...]:
    """Models that are wholly or partly in the Hugging Face cache, by name; asks no network."""
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    return tuple(
        FoundModel(repo_id=repo.repo_id, is_cached=True)
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model" and any(_has_weights(revision) for revision in repo.revisions)
    )


def fetch_config(repo_id: str) -> dict[str, Any]:
    """A model's config.json, from the Hub or the cache.

    Raises:
        ModelNotFound: No such model, no access, no connection and no copy, or no usable config.json.
    """
    try:
        with hidden_bars():
            file = hf_hub_download(repo_id, "config.json")
        with open(file, encoding="utf-8") as stream:
            config = json.load(stream)
    except HUB_ERRORS as error:
        raise explain_hub_error(error, repo_id, None) from error
    except ValueError as error:
        raise ModelNotFound(f"config.json of {repo_id} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelNotFound(f"config.json of {repo_id} is no object")
    return config


def _has_weights(revision: Any) -> bool:
    """Whether a snapshot in the cache holds weights that mlx-lm reads."""
    names = [file.file_name for file in revision.files]
    return "config.json" in names and any(
        name.startswith("model") and name.endswith(".safetensors") for name in names
    )
