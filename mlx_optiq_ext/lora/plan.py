"""The ranks of an adapter and where it starts, from all the measurements that are at hand.

Opens files that options name or that lie in the base's folder; the rules are ``ranks``' and ``residual``'s.
Called by ``train``.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.layers import apply_lora
from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.residual import QuantizationErrors
from mlx_optiq_ext.lora.targets import select_targets
from mlx_optiq_ext.measure.calibration import load_windows
from mlx_optiq_ext.models.load import load_model, load_tokenizer
from mlx_optiq_ext.types.adapter import AdapterOptions, RankMap
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["AdapterPlan", "plan_adapter"]

_NUM_TOKENS, _WINDOW = 2048, 128


class AdapterPlan:
    """Ranks, and how the adapter starts.

    Args:
        ranks: Of every target.
        options: Scale and start.
        errors: Measured, where the original weights are at hand.
    """

    def __init__(self, ranks: RankMap, options: AdapterOptions, errors: QuantizationErrors | None) -> None:
        self.ranks = ranks
        self._options = options
        self._errors = errors

    def apply(
        self, model: nn.Module, *, dropout: float, seed: int, progress: ProgressSink = ignore_progress
    ) -> None:
        """Freeze the model and put the adapter onto it; evaluates."""
        layers = apply_lora(model, self.ranks, scale=self._options.scale, dropout=dropout, seed=seed)
        if self._options.init == "error" and self._errors is not None:
            self._errors.start(layers, self.ranks, progress)
            mx.eval(model.trainable_parameters())


def plan_adapter(
    model: nn.Module,
    base: ModelRef,
    options: AdapterOptions,
    progress: ProgressSink = ignore_progress,
    *,
    trust_remote_code: bool = False,
) -> AdapterPlan:
    """Decide the ranks of an adapter.

    Args:
        model: The base, evaluated, without adapters.
        base: Its folder; ``optiq/sensitivity.json`` in it counts where no other file is named.
        options: Rule, targets, ceiling, start, and the original's place.
        progress: Told about measured spectra, which count where the adapter starts by undoing the error.
        trust_remote_code: Let the original's own code run.
    Raises:
        UsageError: The start needs ``--original``, or nothing does; or see
            :func:`~mlx_optiq_ext.lora.ranks.plan_ranks`.
        AdapterError: The original is another model.
    """
    if options.init == "error" and options.original is None:
        raise UsageError("--init error needs the unquantized weights: name them with --original")
    if options.original is not None and options.init != "error":
        raise UsageError("--original is for --init error, which undoes the quantization error; leave it out")
    table = _table(base, options)
    if options.original is None:
        return AdapterPlan(plan_ranks(model, options, table=table), options, None)
    source = resolve_model(options.original, progress=progress, trust_remote_code=trust_remote_code)
    original, _ = load_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    windows = load_windows(tokenizer, num_tokens=_NUM_TOKENS, window=_WINDOW)
    targets = select_targets(model, options)
    errors = QuantizationErrors(model, original, mx.array(windows.tokens), targets)
    wants_spectra = options.rank_scaling in (None, "by_sensitivity") and table is not None
    spectra = errors.spectra(progress) if wants_spectra else None
    return AdapterPlan(plan_ranks(model, options, table=table, spectra=spectra), options, errors)


def _table(base: ModelRef, options: AdapterOptions) -> SensitivityTable | None:
    if options.sensitivity is not None:
        return read_sensitivity(options.sensitivity)
    if (Path(base.path) / "optiq" / "sensitivity.json").is_file():
        return read_sensitivity(base.path)
    return None
