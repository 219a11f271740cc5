"""Values of the KV cache: what each layer stores, what was measured, what fits.

Knows nothing of MLX or files. Made by ``kv``; stored as ``kv_config.json`` and ``kv_sensitivity.json``.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from mlx_optiq_ext.types.quant import KEEP, CalibrationInfo, Choice, ModelFingerprint

__all__ = [
    "KVConfig",
    "KVLayer",
    "KVProbe",
    "KVScore",
    "KVScoreReport",
    "KVScoreRow",
    "KVSensitivity",
    "KVSite",
    "KVTensor",
    "NeedleCell",
    "cache_name",
    "cached_numbers",
    "sliding_slack",
]

KVTensor = Literal["k", "v"]


def sliding_slack(window: int) -> int:
    """Tokens that a sliding cache holds beyond its window before it drops any (an eighth of it)."""
    return max(16, window // 8)


def cache_name(index: int, member: int | None) -> str:
    """Short name of a cache for tables and messages: ``12``, or ``12.0`` within a list."""
    return f"{index}" if member is None else f"{index}.{member}"


class KVSite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cache of keys and values in a model, as a forward pass shows it."""

    index: int
    """Position in the list that ``make_prompt_cache`` returns."""
    member: int | None = None
    """Position within a ``CacheList`` at ``index``; None where the cache stands alone."""
    layer: int | None = None
    """Block that fills the cache; differs from ``index`` where blocks without cache are left out."""
    heads: int
    """Key-value heads."""
    key_dim: int
    value_dim: int
    window: int | None = None
    """Tokens that a sliding cache keeps; None where it grows with the context."""
    first_kept: int = 0
    """Leading tokens that a sliding cache never drops."""

    @property
    def name(self) -> str:
        """Its :func:`cache_name`."""
        return cache_name(self.index, self.member)

    def numel(self, tensor: KVTensor) -> int:
        """Cached numbers per token."""
        return self.heads * (self.key_dim if tensor == "k" else self.value_dim)

    def tokens_held(self, context: int) -> int:
        """Tokens in the cache when the context has ``context``."""
        return context if self.window is None else min(context, self.window)


def cached_numbers(sites: Sequence[KVSite], context: int) -> int:
    """Numbers, keys and values, that caches hold of ``context`` tokens; windows count what they hold."""
    return sum((site.numel("k") + site.numel("v")) * site.tokens_held(context) for site in sites)


class KVLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one cache stores its keys and its values; ``keep`` is the model's own precision."""

    index: int
    """Position in the list that ``make_prompt_cache`` returns; −1: the one that block ``layer`` fills."""
    member: int | None = None
    layer: int | None = None
    k: Choice = KEEP
    v: Choice = KEEP
    key_mean: str = ""
    """Base64 of float16 (heads × key_dim), little endian: subtracted from every key; empty: nothing is."""
    values_rotated: bool = False
    """The weights produce rotated values already (folded at conversion)."""


class KVConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Storage of a model's KV cache; the content of ``kv_config.json``."""

    format_version: int = 1
    model: ModelFingerprint | None = None
    """Model that was measured; None for the published list form, which does not say."""
    sites: tuple[KVSite, ...] = ()
    """Its caches: a model with others is refused. Empty: not said."""
    layers: tuple[KVLayer, ...]
    rotate: bool = True
    """Keys and values are stored after an orthonormal Hadamard rotation along the head."""
    recent: int = 0
    """Last tokens that are kept in full precision besides."""
    first: int = 0
    """First tokens that are kept in full precision besides (attention sinks)."""
    bits_per_number: float = 0.0
    """Stored bits per cached number at ``context``, scales and biases included."""
    bytes_per_token: float = 0.0
    """At ``context`` tokens, with 16-bit scales; sliding caches count their window."""
    context: int = 0
    """Tokens in the cache for which the figures hold."""
    chosen: str = ""
    """Which candidate was accepted, and against what."""
    predicted_divergence: float | None = None
    sensitivity_sha256: str = ""
    """Of the ``kv_sensitivity.json`` that the choices come from."""
    held_out_sha256: str = ""
    """Of the text on which it was accepted: scores on the same text flatter it."""
    notes: tuple[str, ...] = ()
    code_version: str = ""


class KVProbe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Divergence caused by storing one cache's keys or values as one choice, everything else exact."""

    index: int
    member: int | None = None
    tensor: KVTensor
    choice: Choice
    divergence: float
    """KL(reference ‖ changed), nats per token, mean over windows and positions."""
    stderr: float = 0.0
    by_length: tuple[float, ...] = ()
    """The same per prefix length, in the order of :attr:`KVSensitivity.lengths`."""
    exact: bool = False
    """True: a forward pass was run; False: second-order estimate."""


class KVScore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One whole cache configuration on held-out text."""

    label: str
    bits_per_number: float
    divergence: float
    """KL(reference ‖ this), nats per token, mean over the lengths."""
    stderr: float = 0.0
    half_width: float = 0.0
    """Half of the 95 % interval over windows (Student's t)."""
    num_windows: int = 0
    by_length: tuple[float, ...] = ()
    top1: float = 0.0
    """Share of positions whose most likely token is the reference's."""
    accepted: bool = False


class KVSensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All measurements of one model's cache: enough to allocate for any budget without measuring again."""

    format_version: int = 1
    model: ModelFingerprint | None = None
    calibration: CalibrationInfo | None = None
    settings: str = ""
    """SHA-256 of text, candidates and seeds: what besides the model a measurement depends on."""
    lengths: tuple[int, ...]
    """Prefix lengths measured, in tokens."""
    sites: tuple[KVSite, ...]
    rotate: bool
    """Whether keys were centred and keys and values rotated."""
    probes: tuple[KVProbe, ...]
    key_means: tuple[str, ...] = ()
    """Per site as in :attr:`KVLayer.key_mean`; empty where keys are not centred."""
    scores: tuple[KVScore, ...] = ()
    """Whole configurations that were run on the held-out split, best first."""
    values_rotated: tuple[int, ...] = ()
    """Blocks whose weights make rotated values already: theirs were not rotated again."""
    refused: tuple[tuple[str, str], ...] = ()
    """(cache, reason) of caches left in full precision."""
    notes: tuple[str, ...] = ()
    code_version: str = ""


class KVScoreRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model with one cache on held-out windows of one length."""

    model: str
    """Name of the checkpoint."""
    cache: str
    """``full precision``, ``configured``, or ``uniform`` and its choices."""
    length: int
    """Tokens per window."""
    num_windows: int
    divergence: float
    """KL(reference with its full-precision cache ‖ this), nats per token, over the ends of the windows."""
    divergence_stderr: float = 0.0
    divergence_half_width: float = 0.0
    """Half of the 95 % interval (Student's t); 0 where one window tells nothing about the spread."""
    top1: float
    """Share of positions whose most likely token is the reference's."""
    top1_half_width: float = 0.0
    perplexity: float
    perplexity_half_width: float = 0.0
    bits_per_number: float
    """Stored bits per cached number, 16-bit scales and biases counted."""
    bytes_per_token: float
    """The same per token of the window: what 16-bit inference is predicted to hold."""
    held_bytes_per_token: float
    """What the buffers of this run held, in the precision it ran in, with room to grow."""


class NeedleCell(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fact hidden in a context, and whether it is found with one cache."""

    model: str
    cache: str
    length: int
    """Tokens of context, question and answer."""
    depth: float
    """Where the fact stands: 0 is the beginning, 1 the end of the context."""
    full_found: float
    """Share of answer tokens that the full-precision cache ranks first."""
    found: float
    """The same with this cache."""
    log_probability_change: float
    """Of the whole answer, against the full-precision cache; nats."""


class KVScoreReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caches compared: the reference's first, then those of the other checkpoints."""

    format_version: int = 1
    reference: str
    held_out: CalibrationInfo
    rows: tuple[KVScoreRow, ...]
    needles: tuple[NeedleCell, ...] = ()
    notes: tuple[str, ...] = ()
    code_version: str = ""
