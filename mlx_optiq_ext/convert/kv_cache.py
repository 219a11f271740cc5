"""From a checkpoint to a KV configuration: measure, allocate, compare on held-out text, accept.

Composes ``kv`` and ``eval``; writes nothing. Called by ``optiq kv-cache``.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.tokenizer_utils import TokenizerWrapper
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.convert.kv_accept import accept, compare_candidates, estimate_note, loss_notes
from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.kv.allocate import (
    CacheCandidate,
    Extent,
    candidates_within,
    layers_of,
    require_feasible,
    stored_bits,
)
from mlx_optiq_ext.kv.fold import rotated_blocks
from mlx_optiq_ext.kv.observe import CacheMap, observe
from mlx_optiq_ext.kv.sensitivity import (
    CacheEstimates,
    EstimateSettings,
    KVTokens,
    choices_for,
    estimate_divergences,
)
from mlx_optiq_ext.measure.records import Split
from mlx_optiq_ext.measure.sessions import Sessions, load_sessions, prefix_lengths
from mlx_optiq_ext.models.load import load_model, load_tokenizer
from mlx_optiq_ext.quant.exact import make_exact, parameter_nbytes
from mlx_optiq_ext.types.figures import FEWEST_WINDOWS
from mlx_optiq_ext.types.kv import KVConfig, KVSensitivity, KVTensor
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import KVCacheOptions
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import AFFINE_GROUPS, KEEP, Choice

__all__ = ["CachePlan", "plan_cache"]


class CachePlan(NamedTuple):
    """What was measured and decided."""

    table: KVSensitivity
    config: KVConfig
    reused: bool
    """The measurement was taken from an earlier run."""
    weights_nbytes: int
    """Bytes of the checkpoint's weights, for ``--fit``."""
    positions: int | None
    """Tokens that the model was made for, where its config says it."""


def plan_cache(
    ref: ModelRef,
    options: KVCacheOptions,
    *,
    known: KVSensitivity | None = None,
    on_table: Callable[[KVSensitivity], None] = lambda _: None,
    progress: ProgressSink = ignore_progress,
) -> CachePlan:
    """Measure a model's cache and choose how to store it.

    Args:
        ref: The checkpoint that will be served, quantized or not.
        options: See :class:`KVCacheOptions`.
        known: An earlier measurement; used where model, text and settings are the same, so that a stopped
            run goes on and another target measures nothing again.
        on_table: Gets the measurement as soon as it is there.
        progress: Stages ``forward``, ``measure``, ``score``.
    Raises:
        UnsupportedModel: No cache of the model can be stored otherwise.
        BudgetInfeasible: The target is below the cheapest storage.
        MeasurementError: No text for any prefix length, or gradients that are not finite.
        ResourceError: The weights do not fit into memory.
    Cost: per prefix length one forward and, per label sample, one recomputation and one backward pass; then
        one forward over the held-out text per candidate, half of it for those that are clearly worse.
    """
    model, model_config = load_model(ref, trust_remote_code=options.trust_remote_code)
    folded = rotated_blocks(model_config)
    weights = parameter_nbytes(model)
    caches = observe(model)
    candidates = _candidates(caches, options)
    extent = Extent(options.context, options.recent, options.first)
    require_feasible(caches.sites, candidates, options.target_bits, extent)
    tokenizer = load_tokenizer(ref, trust_remote_code=options.trust_remote_code)
    make_exact(model, ref.source)
    text = _sessions(tokenizer, options, "calibration")
    held_out = _sessions(tokenizer, options, "held_out")
    model_id, settings = fingerprint(ref), _settings(options, text)
    reused = known is not None and known.model == model_id and known.settings == settings
    if known is not None and reused:
        table = replace(known, scores=())
    else:
        how = EstimateSettings(options.rotate, options.label_samples, options.seed, folded)
        table = _measure(model, caches, candidates, text, how, progress)
        table = replace(table, model=model_id, settings=settings)
        on_table(table)
    found = candidates_within(table, options.target_bits, extent)
    configs = [_config(table, candidate, options) for candidate in found]
    scored = compare_candidates(model, found, configs, held_out, progress)
    accepted, reason = accept(scored)
    score = accepted.score()
    scores = tuple(replace(entry.score(), accepted=entry is accepted) for entry in scored)
    table = replace(table, scores=scores, notes=tuple(dict.fromkeys((*table.notes, *held_out.info.notes))))
    notes = (*table.notes, *_dense_note(caches), *_context_note(_positions(model_config), options.context))
    notes += loss_notes(accepted.candidate, score)
    if options.recent or options.first:
        notes += (_exact_note(options),)
    else:
        notes += estimate_note(accepted.candidate, score)
    config = replace(accepted.config, chosen=reason, notes=notes, held_out_sha256=held_out.info.sha256)
    return CachePlan(table, config, reused, weights, _positions(model_config))


def _sessions(tokenizer: TokenizerWrapper, options: KVCacheOptions, split: Split) -> Sessions:
    """Text to measure, or to compare on; refused before any long work where it reaches no prefix length."""
    measures = split == "calibration"
    text = load_sessions(
        tokenizer,
        prefix_lengths(options.context),
        num_tokens=options.num_tokens,
        source=options.calibration if measures else options.held_out,
        split=split,
        least=1 if measures else FEWEST_WINDOWS,
    )
    if not text.windows:
        verb = "measured" if measures else "compared"
        raise MeasurementError(f"nothing can be {verb}: {'; '.join(text.info.notes)}")
    return text


def _settings(options: KVCacheOptions, text: Sessions) -> str:
    """Hash of everything that a measurement depends on besides the model."""
    relevant = (
        options.candidate_bits,
        options.candidate_groups,
        options.rotate,
        options.label_samples,
        options.seed,
        sorted((length, len(windows)) for length, windows in text.windows.items()),
        text.info.sha256,
        __version__,
    )
    return hashlib.sha256(msgspec.json.encode(relevant)).hexdigest()


def _candidates(caches: CacheMap, options: KVCacheOptions) -> dict[tuple[str, KVTensor], tuple[Choice, ...]]:
    """Choices of every tensor that its head allows."""
    groups = [int(word) for word in options.candidate_groups.split(",") if word.strip()]
    if not groups or any(group not in AFFINE_GROUPS for group in groups):
        raise UsageError(
            f"--candidate-groups {options.candidate_groups!r}: name some of {AFFINE_GROUPS}, such as 32,64"
        )
    offered: dict[Choice, None] = {}
    for word in options.candidate_bits.split(","):
        if word.strip():
            for group in groups:
                offered[Choice.parse(word, default_group=group)] = None
    wrong = [choice.label for choice in offered if choice.mode not in ("affine", "keep")]
    if wrong or not offered:
        raise UsageError(
            f"--candidate-bits {options.candidate_bits!r}: a KV cache stores bits 2, 3, 4, 5, 6 or 8, "
            "or BITSgGROUP such as 4g64"
        )
    found: dict[tuple[str, KVTensor], tuple[Choice, ...]] = {}
    for site in caches.sites:
        for tensor, dim in (("k", site.key_dim), ("v", site.value_dim)):
            fitting = [choice for choice in choices_for(dim) if choice in offered and choice != KEEP]
            found[site.name, tensor] = (*fitting, KEEP)  # type: ignore[index]
    return found


def _measure(
    model: nn.Module,
    caches: CacheMap,
    candidates: dict[tuple[str, KVTensor], tuple[Choice, ...]],
    text: Sessions,
    how: EstimateSettings,
    progress: ProgressSink,
) -> KVSensitivity:
    model.train()  # gives the differentiable form of kernels that have no gradient
    windows = [KVTokens(length, tokens) for length, tokens in text.windows.items()]
    estimates = estimate_divergences(model, caches, windows, candidates, how, progress)
    model.eval()
    mx.clear_cache()
    return KVSensitivity(
        calibration=text.info,
        lengths=tuple(text.windows),
        sites=caches.sites,
        rotate=how.rotate,
        values_rotated=how.values_rotated,
        probes=estimates.probes,
        key_means=estimates.key_means,
        refused=(*caches.refused, *_refused(candidates, estimates)),
        notes=text.info.notes,
        code_version=__version__,
    )


def _refused(
    candidates: dict[tuple[str, KVTensor], tuple[Choice, ...]], estimates: CacheEstimates
) -> list[tuple[str, str]]:
    """Tensors that stay in full precision, and why."""
    words = {"k": "keys", "v": "values"}
    found = [
        (name, f"{words[tensor]} are kept: no candidate group divides the head")
        for (name, tensor), choices in candidates.items()
        if choices == (KEEP,)
    ]
    for entry in estimates.silent:
        name, _, tensor = entry.rpartition(".")
        found.append(
            (name, f"{words[tensor]} are kept: they act through a selection that no derivative sees")
        )
    return found


def _positions(config: dict[str, Any]) -> int | None:
    """Tokens that a model was made for, where its config says it."""
    limit = {**config, **(config.get("text_config") or {})}.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def _context_note(positions: int | None, context: int) -> tuple[str, ...]:
    """Say where the model was not made for the context."""
    if positions is None or context <= positions:
        return ()
    return (f"the model's config names {positions:,} positions, --context is {context:,}",)


def _exact_note(options: KVCacheOptions) -> str:
    """What estimates do not know of tokens in full precision."""
    return (
        "estimates per layer are of packed tokens alone: they do not know of the first "
        f"{options.first} and last {options.recent} tokens in full precision, the whole caches compared do"
    )


def _dense_note(caches: CacheMap) -> tuple[str, ...]:
    if not caches.dense:
        return ()
    return (f"stored tensors are unpacked at every step, for {caches.dense}: memory is saved, time is not",)


def _config(table: KVSensitivity, candidate: CacheCandidate, options: KVCacheOptions) -> KVConfig:
    extent = Extent(options.context, options.recent, options.first)
    bits = stored_bits(table.sites, candidate.choices, extent)
    return KVConfig(
        model=table.model,
        sites=table.sites,
        layers=layers_of(table, candidate.choices),
        rotate=table.rotate,
        recent=options.recent,
        first=options.first,
        bits_per_number=candidate.bits_per_number,
        bytes_per_token=bits / 8 / options.context,
        context=options.context,
        predicted_divergence=candidate.predicted,
        notes=table.notes,
        code_version=__version__,
    )
