"""Checkpoints with stored KV caches against the reference with a full-precision one, by context length.

Called by ``optiq score --kv-config``; ``kv_score`` runs the windows, ``needle`` the hidden facts.
"""

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.eval.kv_score import CacheNumbers, NamedConfig, score_caches
from mlx_optiq_ext.eval.logits import LogitCache
from mlx_optiq_ext.eval.needle import FULL, Haystack, check_needles, needle_notes
from mlx_optiq_ext.eval.score import model_name, require_same_tokens
from mlx_optiq_ext.formats.kv_config import read_kv_config
from mlx_optiq_ext.hub.fingerprint import other_weights
from mlx_optiq_ext.kv.allocate import Extent, stored_bits
from mlx_optiq_ext.kv.build import follow_weights, layouts, unnamed_caches
from mlx_optiq_ext.kv.fold import rotated_blocks
from mlx_optiq_ext.kv.observe import CacheMap, observe
from mlx_optiq_ext.measure.intervals import estimate_mean
from mlx_optiq_ext.measure.sessions import Sessions, load_sessions, prefix_lengths
from mlx_optiq_ext.models.load import load_model, load_tokenizer
from mlx_optiq_ext.quant.exact import make_exact
from mlx_optiq_ext.types.figures import FEWEST_WINDOWS
from mlx_optiq_ext.types.kv import (
    KVConfig,
    KVLayer,
    KVScoreReport,
    KVScoreRow,
    KVTensor,
    NeedleCell,
    cached_numbers,
)
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import KVScoreOptions, ScoreOptions
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import AFFINE_GROUPS, KEEP, Choice

__all__ = ["compare_caches", "parse_lengths", "predicted_bits", "uniform_config"]

_DEFAULT_GROUP = 64
_LEAST_LENGTH = 16


def compare_caches(
    reference: ModelRef,
    candidates: Sequence[ModelRef],
    options: ScoreOptions,
    kv: KVScoreOptions,
    progress: ProgressSink = ignore_progress,
) -> KVScoreReport:
    """Score every checkpoint with the full-precision cache and with every stored one.

    Args:
        reference: The model whose full-precision cache everything is compared with.
        candidates: Checkpoints of it.
        options: Text; ``num_tokens`` counts per length, and every length gets four windows at least.
        kv: Caches, lengths, and whether facts are hidden.
        progress: Stages ``score`` and ``needle``.
    Raises:
        UsageError: No cache to compare, or an unreadable length or choice.
        FingerprintMismatch: A configuration or a checkpoint belongs to another model.
        MeasurementError: The text reaches none of the lengths.
    Cost: per checkpoint, cache and window one forward; with needles 5 more per length.
    """
    named = tuple(word.strip() for word in kv.kv_uniform.split(",") if word.strip())
    if kv.kv_config is None and not named:
        raise UsageError("no KV cache to compare: give --kv-config FILE or --kv-uniform 8,4,k6v4")
    config = read_kv_config(kv.kv_config) if kv.kv_config is not None else None
    tokenizer = load_tokenizer(reference, trust_remote_code=options.trust_remote_code)
    for candidate in candidates:
        require_same_tokens(tokenizer, reference, candidate, trust_remote_code=options.trust_remote_code)
    text = load_sessions(
        tokenizer,
        prefix_lengths(kv.context) if kv.lengths is None else parse_lengths(kv.lengths),
        num_tokens=options.num_tokens,
        source=options.held_out,
        split="held_out",
        least=FEWEST_WINDOWS,
    )
    if not text.windows:
        raise MeasurementError(f"no cache can be compared: {'; '.join(text.info.notes)}")
    rows: list[KVScoreRow] = []
    needles: list[NeedleCell] = []
    notes: list[str] = [f"held-out text: {note}" for note in text.info.notes]
    if config is not None and config.held_out_sha256 == text.info.sha256:
        notes.append(
            "the configuration was accepted on this very text, which flatters it; --held-out takes another"
        )
    with ExitStack() as closing:
        kept = {n: closing.enter_context(LogitCache(len(w))) for n, w in text.windows.items()}
        for ref in (reference, *candidates):
            model, about = load_model(ref, trust_remote_code=options.trust_remote_code)
            caches = observe(model)
            make_exact(model, ref.source)
            own = follow_weights(config, caches, rotated_blocks(about)) if config is not None else None
            found = _configs(caches, own, named)
            rows += _rows(model_name(ref), model, caches, found, _Text(text, kept, progress))
            if kv.needle:
                haystack = Haystack(model_name(ref), tokenizer, text.windows, kv.seed)
                needles += check_needles(model, haystack, found, progress)
            if caches.dense:
                notes.append(f"stored tensors are unpacked at every step, for {caches.dense}")
            notes += [f"cache {name}: {why}" for name, why in caches.refused]
            notes += _config_notes(ref, caches, config)
            del model
            mx.clear_cache()
    return KVScoreReport(
        reference=model_name(reference),
        held_out=text.info,
        rows=tuple(rows),
        needles=tuple(needles),
        notes=tuple(dict.fromkeys((*notes, *needle_notes(needles)))),
        code_version=__version__,
    )


def _config_notes(ref: ModelRef, caches: CacheMap, config: KVConfig | None) -> list[str]:
    """Where the configuration was made for other weights, or leaves caches out."""
    if config is None:
        return []
    notes = []
    if config.model is not None:
        other = other_weights(config.model, ref)
        notes += [f"the KV configuration {other}; `optiq kv-cache` makes one for these"] if other else []
    unnamed = unnamed_caches(caches, config)
    if unnamed:
        notes.append(f"caches {', '.join(unnamed)} are not in the configuration: full precision")
    return notes


def parse_lengths(text: str) -> tuple[int, ...]:
    """Prefix lengths of ``--lengths``, ascending.

    Raises:
        UsageError: A word is no number of at least 16 tokens.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) >= _LEAST_LENGTH for word in words):
        raise UsageError(f"--lengths {text!r}: name tokens, {_LEAST_LENGTH} or more each, such as 256,1024")
    return tuple(sorted({int(word) for word in words}))


def uniform_config(caches: CacheMap, word: str) -> KVConfig:
    """Every cache stored alike, neither centred nor rotated.

    Args:
        caches: Of the model.
        word: ``8``, ``4g32`` or, keys and values apart, ``k6v4``. Bits alone take group 64, or the largest
            smaller one that divides the head; where none does, the tensor is kept.
    Raises:
        UsageError: Not a storage of a KV cache.
    """
    pair = re.fullmatch(r"k(\w+?)v(\w+)", word)
    keys, values = pair.groups() if pair else (word, word)
    return KVConfig(
        layers=tuple(
            KVLayer(
                index=site.index,
                member=site.member,
                layer=site.layer,
                k=_choice(keys, site.key_dim),
                v=_choice(values, site.value_dim),
            )
            for site in caches.sites
        ),
        rotate=False,
    )


def _choice(word: str, dim: int) -> Choice:
    """A choice of ``--kv-uniform`` for a head of ``dim`` numbers."""
    choice = Choice.parse(word)
    if choice.mode not in ("affine", "keep"):
        raise UsageError(f"--kv-uniform {word}: a KV cache stores affine codes or full precision")
    if choice.fits(dim) or not word.isdecimal():
        return choice
    groups = [group for group in AFFINE_GROUPS if group < _DEFAULT_GROUP and dim % group == 0]
    return Choice(bits=choice.bits, group_size=max(groups)) if groups else KEEP


def _configs(caches: CacheMap, config: KVConfig | None, uniform: Sequence[str]) -> tuple[NamedConfig, ...]:
    """All stored caches of one model, the given one first."""
    given = (NamedConfig("configured", config),) if config is not None else ()
    return (*given, *(NamedConfig(f"uniform {word}", uniform_config(caches, word)) for word in uniform))


class _Text(NamedTuple):
    """Windows, the reference's logits on them, and who is told."""

    sessions: Sessions
    kept: dict[int, LogitCache]
    progress: ProgressSink


def _rows(
    model_label: str, model: nn.Module, caches: CacheMap, configs: Sequence[NamedConfig], text: _Text
) -> list[KVScoreRow]:
    """One model with every cache at every length, the full-precision cache first."""
    full = NamedConfig(FULL, KVConfig(layers=()))
    found = []
    for length, tokens in text.sessions.windows.items():
        numbers = score_caches(model, tokens, configs, kept=text.kept[length], progress=text.progress)
        for named, entry in zip((full, *configs), numbers, strict=True):
            found.append(_row(model_label, named, entry, caches, length))
    return sorted(found, key=lambda row: [c.label for c in (full, *configs)].index(row.cache))


def _row(
    model_label: str, named: NamedConfig, numbers: CacheNumbers, caches: CacheMap, length: int
) -> KVScoreRow:
    divergence, top1 = estimate_mean(numbers.divergence), estimate_mean(numbers.top1)
    nll = estimate_mean(numbers.nll)
    bits = predicted_bits(caches, named.config, length)
    cached = cached_numbers(caches.sites, length)
    return KVScoreRow(
        model=model_label,
        cache=named.label,
        length=length,
        num_windows=len(numbers.divergence),
        divergence=divergence.mean,
        divergence_stderr=divergence.stderr,
        divergence_half_width=divergence.half_width,
        top1=top1.mean,
        top1_half_width=top1.half_width,
        perplexity=math.exp(nll.mean),
        perplexity_half_width=math.exp(nll.mean) * nll.half_width,
        bits_per_number=bits / cached,
        bytes_per_token=bits / 8 / length,
        held_bytes_per_token=numbers.nbytes / length,
    )


def predicted_bits(caches: CacheMap, config: KVConfig, context: int) -> int:
    """Bits of all caches of keys and values at ``context`` tokens, as 16-bit inference holds them."""
    found = layouts(caches, config)
    choices: dict[tuple[str, KVTensor], Choice] = {}
    for site in caches.sites:
        layout = found[site.index, site.member]
        choices[site.name, "k"], choices[site.name, "v"] = layout.key.choice, layout.value.choice
    return stored_bits(caches.sites, choices, Extent(context, config.recent, config.first))
