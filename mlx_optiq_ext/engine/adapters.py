"""The adapters of one model by name: mounted, summed, counted, let go when no row uses them.

Knows names and files; ``mlx_optiq_ext.adapters`` knows the layers. Called on the owner thread, but for the
numbers of users, which change under a lock.
"""

import hashlib
import re
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.adapters.mount import AdapterMount
from mlx_optiq_ext.adapters.rows import BASE
from mlx_optiq_ext.errors import RequestError, UnknownName
from mlx_optiq_ext.lora.factors import Factors, side_by_side
from mlx_optiq_ext.lora.files import locate_factors, read_adapter
from mlx_optiq_ext.types.status import AdapterStatus

__all__ = ["NO_ADAPTER", "ModelAdapters", "Mounted", "check_adapter_name"]

NO_ADAPTER = "base"
"""Asks for the base model where another adapter is the default."""
_UNQUANTIZED = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Mounted:
    """An adapter in its slot, or the base in none."""

    def __init__(self, name: str, slot: int, digest: str, factors: dict[str, Factors]) -> None:
        self.name = name
        self.slot = slot
        self.digest = digest
        """Of all its numbers: what prefixes are kept under."""
        self.factors = factors
        self.source = ""
        self.fits_base: bool | None = None
        self.requests = 0
        self.users = 0


class ModelAdapters:
    """What can be named in requests to one model.

    Args:
        model: Its module tree, without adapters.
        fingerprint: SHA-256 of its weights.
        dtype: What it computes in.
    """

    def __init__(self, model: Any, fingerprint: str, dtype: mx.Dtype) -> None:
        self._mount = AdapterMount(model)
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._base_bits = {
            path: getattr(layer, "bits", _UNQUANTIZED) for path, layer in model.named_modules()
        }
        self._base = Mounted("", BASE, "", {})
        self._named: dict[str, Mounted] = {}
        self._sums: dict[str, Mounted] = {}
        self._leaving: list[Mounted] = []
        self._guard = threading.Lock()
        self.default: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self._mount.nbytes

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were mounted."""
        return tuple(self._named)

    def add(self, name: str, folder: Path, source: str) -> Mounted:
        """Mount an adapter from a folder.

        Raises:
            RequestError: The name is taken.
            AdapterError: It is damaged, not finite, or does not fit.
        """
        if name in self._named:
            raise RequestError(f"an adapter {name!r} is mounted already; unmount it first", param="name")
        stored = read_adapter(folder)
        tree: Any = self._mount  # lists the model's modules as they are without adapters
        config, factors = locate_factors(stored, tree)
        scaled = {
            path: Factors(each.a.astype(self._dtype), (each.b * config.scale_of(path)).astype(self._dtype))
            for path, each in factors.items()
        }
        mx.eval([array for each in scaled.values() for array in each])
        mounted = Mounted(name, self._mount.mount(scaled), _digest(scaled), scaled)
        mounted.source = source
        if config.base is not None and config.base.sha256:
            mounted.fits_base = config.base.sha256 == self._fingerprint
        self._named[name] = mounted
        return mounted

    def remove(self, name: str) -> None:
        """Take an adapter's name away; its slot goes in :meth:`sweep`.

        Raises:
            UnknownName: There is none.
        """
        gone = self._named.pop(self._known(name).name)
        self._leaving.append(gone)
        for joined in [each for each in self._sums if name in each.split("+")]:
            self._leaving.append(self._sums.pop(joined))
        if self.default is not None and name in self.default.split("+"):
            self.default = None

    def use(self, name: str | None) -> None:
        """Make an adapter, or a sum, the default; None: the base.

        Raises:
            UnknownName: There is none.
        """
        for part in (name or "").split("+"):
            if part:
                self._known(part)
        self.default = name

    def take(self, name: str | None) -> Mounted:
        """The adapter of a request; it stays until :meth:`let_go`.

        Args:
            name: An adapter, a sum ``a+b``, ``base``, or None for the default.
        Raises:
            UnknownName: There is none of that name.
        """
        asked = self.default if name is None else name
        mounted = self._base if not asked or asked == NO_ADAPTER else self._found(asked)
        with self._guard:
            mounted.users += 1
            mounted.requests += 1
        return mounted

    def let_go(self, mounted: Mounted) -> None:
        """A request is done with its adapter; any thread."""
        with self._guard:
            mounted.users -= 1

    def sweep(self) -> None:
        """Free the slots of adapters that are gone and that no row uses."""
        for mounted in [each for each in self._leaving if each.users == 0]:
            self._mount.unmount(mounted.slot)
            self._leaving.remove(mounted)

    def status(self, model: str) -> tuple[AdapterStatus, ...]:
        """What is mounted."""
        return tuple(
            AdapterStatus(
                name=each.name,
                model=model,
                source=each.source,
                rank=max(factor.rank for factor in each.factors.values()),
                ranks={path: factor.rank for path, factor in each.factors.items()},
                base_bits={path: self._base_bits[path] for path in each.factors},
                nbytes=sum(array.nbytes for factor in each.factors.values() for array in factor),
                fits_base=each.fits_base,
                is_default=each.name == self.default,
                requests=each.requests,
            )
            for each in self._named.values()
        )

    def _found(self, asked: str) -> Mounted:
        parts = sorted(asked.split("+"))
        if len(parts) == 1:
            return self._known(asked)
        joined = "+".join(parts)
        if joined not in self._sums:
            members = [self._known(part) for part in parts]
            factors = _summed(members)
            digest = "+".join(member.digest for member in members)
            self._sums[joined] = Mounted(joined, self._mount.mount(factors), digest, factors)
        return self._sums[joined]

    def _known(self, name: str) -> Mounted:
        if name not in self._named:
            known = f"there are: {', '.join(self._named)}" if self._named else "none is"
            raise UnknownName(f"no adapter {name[:80]!r} is mounted; {known}", param="adapter")
        return self._named[name]


def check_adapter_name(name: str) -> str:
    """A name that a request can use.

    Raises:
        RequestError: It cannot.
    """
    if not _NAME.fullmatch(name) or name == NO_ADAPTER:
        raise RequestError(
            f"{name[:80]!r} is no name for an adapter; use letters, digits, '.', '_', '-', and not "
            f"{NO_ADAPTER!r}",
            param="name",
        )
    return name


def _summed(members: list[Mounted]) -> dict[str, Factors]:
    """The sum of several adapters: their ranks side by side, exactly."""
    paths = {path: None for member in members for path in member.factors}
    found = {path: [m.factors[path] for m in members if path in m.factors] for path in paths}
    return {path: side_by_side(parts) for path, parts in found.items()}


def _digest(factors: dict[str, Factors]) -> str:
    digest = hashlib.sha256()
    for path in sorted(factors):
        digest.update(path.encode())
        for array in factors[path]:
            digest.update(str(array.shape).encode())
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()[:32]
