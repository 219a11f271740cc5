"""What a user calls a model → a folder on this machine, pinned to a commit.

Knows what a usable model folder looks like, and nothing of what is in the weights. Called by commands
before any long work; the network is asked only for Hub ids.
"""

import json
import logging
import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mlx_optiq_ext.errors import ModelNotFound, OptiqError, UsageError
from mlx_optiq_ext.hub.explain import HUB_ERRORS, explain_hub_error, is_unreachable
from mlx_optiq_ext.hub.fetch import fetch_files, fetch_listing, find_cached
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress

__all__ = ["check_model_folder", "resolve_model"]

_INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(model-)(\d+)-of-(\d{1,5})\.safetensors")
_log = logging.getLogger(__name__)


def resolve_model(
    source: str,
    revision: str | None = None,
    progress: ProgressSink = ignore_progress,
    *,
    trust_remote_code: bool = False,
) -> ModelRef:
    """Find or download a model.

    A Hub id is looked up on the Hub, pinned to a commit and completed in the Hugging Face cache; where the
    Hub does not answer, a complete cached copy is used, with a warning in the log.

    Args:
        source: A folder, or a Hub id ``ORGANISATION/NAME``. An existing folder wins.
        revision: Branch, tag or commit; only for a Hub id.
        progress: Told about the download, in megabytes.
        trust_remote_code: Also download the repository's Python files.
    Returns:
        Folder with config.json and all weights.
    Raises:
        ModelNotFound: No such folder, repository or revision, no access, no usable weights, or no connection.
        ResourceError: No room for the download; known before it starts.
        UsageError: A revision was given with a folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{source} is a folder and has no revision {revision!r}; leave the revision out")
        check_model_folder(folder)
        return ModelRef(path=str(folder.resolve()), source=source)
    _require_hub_id(source, folder)
    return _resolve_hub_id(source, revision, progress, trust_remote_code)


def check_model_folder(folder: Path) -> None:
    """Make sure that a folder holds config.json and every weight file it names.

    Raises:
        ModelNotFound: Something is missing or unreadable; says what, and what would work.
    """
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if ggufs:
            raise ModelNotFound(
                f"{folder} holds GGUF files; use DIR of `optiq import-gguf {ggufs[0]} -o DIR`"
            )
        raise ModelNotFound(_no_model(folder))
    _require_json_object(folder / "config.json")
    if not any(folder.glob("model*.safetensors")):
        raise ModelNotFound(f"{folder} has no model*.safetensors; {_weights_hint(folder)}")
    missing = _missing_shards(folder)
    if missing:
        raise ModelNotFound(
            f"{folder} lacks {len(missing)} of its weight files, {missing[0]} among them; download it again"
            " to complete it"
        )


def _no_model(folder: Path) -> str:
    """Why a folder without config.json is no model, and what would be one."""
    if not folder.exists():
        return f"there is no folder {folder}; give the folder of a Hugging Face or MLX model"
    inside = sorted(file.parent.name for file in folder.glob("*/config.json"))
    if inside:
        named = ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if inside[3:] else "")
        return (
            f"{folder} is no model but holds some: {named}; name one (`optiq serve --models-dir` takes all)"
        )
    return f"{folder} has no config.json; give the folder of a Hugging Face or MLX model"


def _require_json_object(file: Path) -> None:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelNotFound(f"{file} is no JSON object but a {type(content).__name__}; download it again")


def _weights_hint(folder: Path) -> str:
    """What to do about a folder without weights, from what else lies there."""
    if any(folder.glob("pytorch_model*.bin")):
        return "its PyTorch weights must be saved as safetensors first (save_pretrained does that)"
    if any(folder.glob("adapter*.safetensors")):
        return "it holds an adapter; give the base model, or fuse the adapter first with `mlx_lm.fuse`"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"mlx-lm reads files of that name only, and there is {others[0]}"
    return "the download is incomplete, or this is not a model"


def _missing_shards(folder: Path) -> list[str]:
    """Weight files that the index, or the numbering of the present ones, names and the folder lacks."""
    index = folder / _INDEX
    if not index.is_file():
        present = {path.name for path in folder.glob("model*.safetensors")}
        numbered = [match for name in present if (match := _NUMBERED.fullmatch(name))]
        expected = {
            f"{match[1]}{number:0{len(match[2])}d}-of-{match[3]}.safetensors"
            for match in numbered
            for number in range(1, int(match[3]) + 1)
        }
        return sorted(expected - present)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(
            f"{index} is not a weight index ({type(error).__name__}); download it again"
        ) from error
    return [name for name in names if not (folder / name).is_file()]


def _require_hub_id(source: str, path: Path) -> None:
    """Refuse what cannot be a Hub id, with the likely reason."""
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            raise ModelNotFound(
                f"{source} is a GGUF file; run `optiq import-gguf {source} -o DIR` and use DIR"
            )
        raise ModelNotFound(
            f"{source} is a file; give the folder it lies in, or a Hub id (ORGANISATION/NAME)"
        )
    if re.match(r"^(\.|/|~|[A-Za-z]:\\)", source) or source.count("/") > 1:
        raise ModelNotFound(f"no folder {source}; give an existing folder, or a Hub id (ORGANISATION/NAME)")
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ModelNotFound(
            f"{source!r} is neither a folder here nor a Hub id (ORGANISATION/NAME)"
        ) from error


def _resolve_hub_id(repo_id: str, revision: str | None, progress: ProgressSink, with_code: bool) -> ModelRef:
    try:
        remote = fetch_listing(repo_id, revision, with_code=with_code)
    except HUB_ERRORS as error:
        cached = find_cached(repo_id, revision) if is_unreachable(error) else None
        if cached is None:
            raise _no_folder_either(explain_hub_error(error, repo_id, revision), repo_id) from error
        check_model_folder(cached)
        _log.warning("the Hub does not answer; using %s at commit %s from the cache", repo_id, cached.name)
        return ModelRef(path=str(cached), source=repo_id, revision=cached.name, is_local=False)
    folder = fetch_files(remote, progress=progress)
    check_model_folder(folder)
    return ModelRef(path=str(folder), source=repo_id, revision=remote.commit, is_local=False)


def _no_folder_either(explained: OptiqError, repo_id: str) -> OptiqError:
    """The error of a Hub id that may be a mistyped folder: the folder that would hold it is there."""
    if not isinstance(explained, ModelNotFound) or not Path(repo_id).parent.is_dir():
        return explained
    return ModelNotFound(f"no folder {repo_id} here; as a Hub id: {explained}")
