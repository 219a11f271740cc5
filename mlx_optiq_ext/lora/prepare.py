"""All that a training decides before its first update: data, ranks, and whether it may start at all.

Knows the order of these steps; each is a module of its own. Called by ``train``, and by ``preview``, which
goes no further.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import msgspec

from mlx_optiq_ext.errors import OutputExists, UsageError
from mlx_optiq_ext.formats.atomic import require_absent, require_writable
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.checkpoint import CHECKPOINT_FILE, Store
from mlx_optiq_ext.lora.plan import AdapterPlan, plan_adapter
from mlx_optiq_ext.lora.tokens import TokenData, tokenize_dataset
from mlx_optiq_ext.models.load import load_model
from mlx_optiq_ext.types.adapter import AdapterOptions, RankMap
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.training import METRICS_FILE, TrainOptions

__all__ = ["NOT_IN_SETTINGS", "Prepared", "TrainJob", "prepare_training"]

NOT_IN_SETTINGS = ("resume", "save_every")
"""Options that change no number."""


class TrainJob(msgspec.Struct, frozen=True, kw_only=True):
    """What is trained on what, and where to."""

    base: ModelRef
    data: str
    """See :func:`~mlx_optiq_ext.lora.dataset.load_dataset`."""
    out: Path
    options: TrainOptions = TrainOptions()
    adapter: AdapterOptions = AdapterOptions()
    trust_remote_code: bool = False


class Prepared(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A training that can start."""

    data: TokenData
    model: nn.Module
    """The base, evaluated, without the adapter."""
    plan: AdapterPlan
    store: Store


def prepare_training(
    job: TrainJob,
    *,
    on_ranks: Callable[[RankMap], None],
    on_note: Callable[[str], None],
    progress: ProgressSink = ignore_progress,
) -> Prepared:
    """Check options and output, read the data, load the model, decide the ranks; writes nothing.

    Args:
        job: Model, data, output and options.
        on_ranks: Shown the rank map.
        on_note: Told what was cut and split off.
        progress: Told about every stage.
    Raises:
        OutputExists: The output holds something else than a stopped training.
        UsageError: Unusable data, or options that exclude each other.
    """
    _require_usable(job)
    data = tokenize_dataset(
        job.data, job.base, job.options, progress, trust_remote_code=job.trust_remote_code
    )
    for line in data.notes:
        on_note(line)
    model, _ = load_model(job.base, trust_remote_code=job.trust_remote_code)
    plan = plan_adapter(model, job.base, job.adapter, progress, trust_remote_code=job.trust_remote_code)
    on_ranks(plan.ranks)
    return Prepared(data=data, model=model, plan=plan, store=Store(job.out, _settings(job, data, plan.ranks)))


def _require_usable(job: TrainJob) -> None:
    options, out = job.options, job.out
    if options.method == "dpo" and options.train_on == "all":
        raise UsageError("--train-on all is for sft; dpo compares answers")
    if options.label_smoothing and (options.method != "dpo" or options.dpo_loss != "sigmoid"):
        raise UsageError("--label-smoothing belongs to --method dpo --dpo-loss sigmoid; leave it out")
    if not out.exists():
        require_absent(out)
        return
    present = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name}
    if not present <= {CHECKPOINT_FILE, METRICS_FILE}:
        raise OutputExists(
            f"output {out} already exists and is no unfinished training; remove it or choose another with -o"
        )
    require_writable(out / METRICS_FILE)


def _settings(job: TrainJob, data: TokenData, ranks: RankMap) -> dict[str, str]:
    """All that the result depends on, by name."""
    options = {**msgspec.structs.asdict(job.options), **msgspec.structs.asdict(job.adapter)}
    named = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in options.items()
        if name not in NOT_IN_SETTINGS
    }
    table = msgspec.json.encode(sorted(ranks.ranks.items()))
    return {
        **named,
        "model": fingerprint(job.base).sha256,
        "data": data.sha256,
        "ranks": hashlib.sha256(table).hexdigest(),
    }
