"""Prefixes on disk: as they are held in memory, found again after a restart, checked before they are used.

One snapshot is a folder: ``index.json`` (what it is, with the SHA-256 of every other file), ``caches`` and
one file per checkpoint, in the form of mlx-lm's ``save_prompt_cache``. Knows files and snapshots. Called by
``prefix_cache``.
"""

import hashlib
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_optiq_ext.engine.prefix_cache import Reuse
from mlx_optiq_ext.engine.snapshot import Snapshot, shared_length
from mlx_optiq_ext.errors import UsageError

__all__ = ["DiskTier"]

_INDEX = "index.json"
_LEAST_TOKENS = 256
_LEAST_GAIN = 256
"""Tokens more than memory has, for which a file is read."""
_log = logging.getLogger(__name__)


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int = 1
    key: str
    tokens: bytes
    """int32, little-endian; JSON holds them in base64."""
    lengths: tuple[int, ...] = ()
    """Of the checkpoints."""
    held: tuple[tuple[int, ...], ...] = ()
    """Per checkpoint: which caches it holds."""
    trimmable: bool
    files: dict[str, str]
    """Name → SHA-256."""
    nbytes: int

    def numbers(self) -> np.ndarray:
        """The tokens, (L,) int32."""
        return np.frombuffer(self.tokens, dtype="<i4")


class DiskTier:
    """Snapshots in a folder, the least recently used first to go.

    Args:
        folder: Made where it is missing; nothing else may live in it.
        limit_nbytes: Ceiling of all files.
    Raises:
        UsageError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_nbytes: int) -> None:
        self._folder = folder
        self._limit = limit_nbytes
        self._known: dict[str, _Index] = {}
        """Least recently used first."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
            self._scan()
        except OSError as error:
            raise UsageError(
                f"--prompt-cache-dir {folder}: {error.strerror or error}; name a folder that can be written"
            ) from error

    def best(self, key: str, tokens: np.ndarray, more_than: int) -> Reuse | None:
        """A stored prefix worth reading; a damaged one is removed and said in the log."""
        while True:
            name, length = self._longest(key, tokens)
            if not name or length < more_than + _LEAST_GAIN:
                return None
            snapshot = self._read(name)
            if snapshot is not None:
                self._known[name] = self._known.pop(name)
                return Reuse(snapshot, snapshot.usable(length))

    def keep(self, key: str, snapshot: Snapshot) -> None:
        """Write a snapshot, unless it is short, there already, or part of another one."""
        name = _name_of(key, snapshot.tokens.astype("<i4").tobytes())
        if len(snapshot) < _LEAST_TOKENS or name in self._known or snapshot.nbytes > self._limit:
            return
        covered = [known for known, index in self._known.items() if _covers(key, snapshot, index)]
        partial = self._folder / f".partial-{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            index = self._write(partial, key, snapshot)
            partial.rename(self._folder / name)
        except (OSError, RuntimeError) as error:  # MLX raises the latter where a disk is full
            _log.warning("a prefix could not be written to %s: %s", self._folder, error)
            shutil.rmtree(partial, ignore_errors=True)
            return
        for known in covered:
            self._remove(known)
        self._known[name] = index
        while sum(index.nbytes for index in self._known.values()) > self._limit:
            self._remove(next(iter(self._known)))

    def clear(self) -> int:
        """Remove every snapshot; the bytes they took."""
        held = self.held()[1]
        for name in list(self._known):
            self._remove(name)
        return held

    def held(self) -> tuple[int, int]:
        """Entries and bytes."""
        return len(self._known), sum(index.nbytes for index in self._known.values())

    def _scan(self) -> None:
        """Read every index, oldest first; leftovers of a killed write go."""
        for partial in self._folder.glob(".partial-*"):
            shutil.rmtree(partial, ignore_errors=True)
        for file in sorted(self._folder.glob(f"*/{_INDEX}"), key=lambda file: file.stat().st_mtime):
            try:
                index = msgspec.json.decode(file.read_bytes(), type=_Index)
            except (msgspec.MsgspecError, OSError) as error:
                _log.warning("%s is not a stored prefix (%s); it is left alone", file, error)
                continue
            if index.format_version != 1:
                continue
            if file.parent.name != _name_of(index.key, index.tokens):
                _log.warning("a stored prefix is damaged and is removed: %s is not what was written", file)
                shutil.rmtree(file.parent, ignore_errors=True)
                continue
            self._known[file.parent.name] = index

    def _longest(self, key: str, tokens: np.ndarray) -> tuple[str, int]:
        best, most = "", 0
        for name, index in self._known.items():
            if index.key != key:
                continue
            shared = shared_length(index.numbers(), tokens)
            if not index.trimmable and shared < len(index.numbers()):
                shared = max((length for length in index.lengths if length <= shared), default=0)
            if shared > most:
                best, most = name, shared
        return best, most

    def _read(self, name: str) -> Snapshot | None:
        folder, index = self._folder / name, self._known[name]
        try:
            for file, digest in index.files.items():
                if _sha256(folder / file) != digest:
                    raise ValueError(f"{file} is not what was written")
            caches = load_prompt_cache(str(folder / "caches.safetensors"))
            checkpoints = {}
            for length, held in zip(index.lengths, index.held, strict=True):
                parts = iter(load_prompt_cache(str(folder / f"{length}.safetensors")) if held else ())
                checkpoints[length] = tuple(next(parts) if k in held else None for k in range(len(caches)))
            return Snapshot(index.numbers().tolist(), caches, checkpoints)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            _log.warning("a stored prefix is damaged and is removed: %s", error)
            self._remove(name)
            return None

    def _write(self, folder: Path, key: str, snapshot: Snapshot) -> _Index:
        save_prompt_cache(str(folder / "caches.safetensors"), snapshot.caches)
        held = []
        for length, kept in snapshot.checkpoints.items():
            parts: list[Any] = [cache for cache in kept if cache is not None]
            if parts:
                save_prompt_cache(str(folder / f"{length}.safetensors"), parts)
            held.append(tuple(k for k, cache in enumerate(kept) if cache is not None))
        files = sorted(folder.glob("*.safetensors"))
        index = _Index(
            key=key,
            tokens=snapshot.tokens.astype("<i4").tobytes(),
            lengths=tuple(snapshot.checkpoints),
            held=tuple(held),
            trimmable=all(cache.is_trimmable() for cache in snapshot.caches),
            files={file.name: _sha256(file) for file in files},
            nbytes=sum(file.stat().st_size for file in files),
        )
        (folder / _INDEX).write_bytes(msgspec.json.encode(index))
        return index

    def _remove(self, name: str) -> None:
        self._known.pop(name, None)
        shutil.rmtree(self._folder / name, ignore_errors=True)


def _name_of(key: str, tokens: bytes) -> str:
    """Folder of a snapshot, by which its index is checked."""
    return hashlib.sha256(key.encode() + b"\0" + tokens).hexdigest()[:32]


def _covers(key: str, snapshot: Snapshot, index: _Index) -> bool:
    """Whether a new snapshot gives all that a stored one gives."""
    tokens = index.numbers()
    if index.key != key or shared_length(snapshot.tokens, tokens) < len(tokens):
        return False
    return all(snapshot.usable(length) == length for length in (len(tokens), *index.lengths))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
