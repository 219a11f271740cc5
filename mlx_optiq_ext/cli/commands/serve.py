"""Serve models over the OpenAI and Anthropic APIs.

One process answers /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models and
/v1/embeddings, several requests at once, and shares the prefixes that they have in common. It listens on this
machine alone unless --host says otherwise, and then needs a key in OPTIQ_API_KEY. Ctrl-C or SIGTERM lets
running answers end.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.types.nbytes import parse_nbytes
from mlx_optiq_ext.types.progress import ProgressSink
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus, ServedModel

if TYPE_CHECKING:  # these import MLX
    from mlx_optiq_ext.engine.engine import LocalEngine
    from mlx_optiq_ext.engine.served import ModelSpec

__all__ = ["Serving", "add_arguments", "banner", "run", "start_engine"]

_log = logging.getLogger(__name__)
_MODULES = ("mlx_lm.models.base", "mlx_lm.models.cache")
"""Of mlx-lm, whose patches mixed-precision caches need."""


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints once the server listens."""

    url: str
    """Reachable from this machine."""
    urls: tuple[str, ...]
    """All of them, where it listens on all addresses."""
    models: tuple[ServedModel, ...]
    memory_limit_nbytes: int
    needs_key: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``optiq serve``."""
    add_options(parser, ServeOptions)


def run(args: argparse.Namespace) -> int:
    """Load, listen, answer, until a signal comes or the engine fails."""
    console = Console.from_args(args)
    options = options_from(args, ServeOptions)
    key = read_api_key(options.api_key_file)
    try:
        from mlx_optiq_ext.serve.app import create_app
        from mlx_optiq_ext.serve.auth import Doors, require_key_for
        from mlx_optiq_ext.serve.run_server import require_free_address, run_server
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the server needs {error.name}; install it with `pip install 'mlx-optiq-ext[serve]'`"
        ) from error
    require_key_for(options.host, key)
    Doors.of(options, key)
    parse_nbytes(options.max_body, flag="--max-body")
    require_free_address(options.host, options.port)
    # Deferred: everything above answers without MLX.
    from mlx_optiq_ext.cli.served_models import find_models
    from mlx_optiq_ext.patches.registry import activate

    for module in _MODULES:
        activate(module)
    _log_to_stderr("debug" if getattr(args, "debug", False) else options.log_level)
    _warn_of_half_precision(options.dtype)
    engine = start_engine(find_models(options, console.progress), options, console.progress)
    app = create_app(engine, options, key)

    def listening(urls: tuple[str, ...]) -> None:
        status = engine.status()
        console.result(
            Serving(
                url=urls[0],
                urls=urls,
                models=status.models,
                memory_limit_nbytes=status.memory_limit_nbytes,
                needs_key=key is not None,
            ),
            banner(urls, status, needs_key=key is not None),
        )

    return run_server(app, engine, options, on_listening=listening)


def start_engine(
    specs: "Sequence[ModelSpec]", options: ServeOptions, progress: ProgressSink
) -> "LocalEngine":
    """Start an engine with its default model: the first one that can be loaded, where the user named none.

    Args:
        specs: What can be served.
        options: Of the server.
        progress: Of loading.
    Raises:
        OptiqError: None can be loaded, or the one that was named cannot.
    """
    from mlx_optiq_ext.engine.engine import LocalEngine

    engine = LocalEngine(specs, options, progress=progress)
    try:
        engine.start()
    except OptiqError as error:
        if options.model is not None or options.demo_model or len(specs) == 1:
            raise
        _log.warning("--models-dir: %s is left out: %s", specs[0].name, error)
        return start_engine(specs[1:], options, progress)
    return engine


def _warn_of_half_precision(dtype: str) -> None:
    import mlx.core as mx

    if dtype in ("float16", "bfloat16") and mx.default_device() == mx.Device(mx.cpu):
        _log.warning(
            "--dtype %s: half precision is inexact and many times slower on a CPU (docs/platforms.md); "
            "without --dtype the model runs in float32",
            dtype,
        )


def _log_to_stderr(level: str) -> None:
    """Show what the server says, one line each with the time; who asks over HTTP gets all from INFO on."""
    logging.basicConfig(
        force=True, level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    shown = logging.getLogger().level
    logging.getLogger().handlers[0].setLevel(shown)
    logging.getLogger().setLevel(max(shown, logging.WARNING))
    logging.getLogger("mlx_optiq_ext").setLevel(min(shown, logging.INFO))


def banner(urls: Sequence[str], status: EngineStatus, *, needs_key: bool) -> str:
    """Write what is on, and where.

    Args:
        urls: Where the server listens, the first from this machine.
        status: Of the engine.
        needs_key: Whether requests need one.
    """
    gb, url = 1e9, urls[0]
    lines = [f"optiq serves on {' and '.join(urls)}" + (" (API key needed)" if needs_key else "")]
    for model in status.models:
        if not model.loaded:
            lines.append(f"  {model.id}: loaded when a request names it")
            continue
        bits = f"{model.bpw:.2f} bits per weight" if model.bpw else "unquantized weights"
        cache = f"{model.kv_bits:.2f} bits per cached number" if model.kv_bits else "full-precision KV cache"
        lines.append(
            f"  {model.id}: {model.weights_nbytes / gb:.2f} GB, {bits}, {cache}, context {model.context:,}"
        )
        lines += [_adapter_line(each) for each in status.adapters if each.model == model.id]
    lines.append(
        f"  memory {status.memory_limit_nbytes / gb:.1f} GB, prefix cache up to "
        f"{status.prefix_cache.limit_nbytes / gb:.1f} GB, {status.max_rows} requests at once"
    )
    lines += [
        f"  OpenAI:    {url}/v1   (chat/completions, completions, responses, embeddings, models)",
        f"  Anthropic: {url}      (/v1/messages, /v1/messages/count_tokens)",
        f"  health, metrics, API description: {url}/health {url}/metrics {url}/schema",
    ]
    return "\n".join(lines)


def _adapter_line(adapter: AdapterStatus) -> str:
    """Its name, how large, and whether it belongs to these weights."""
    fits = {
        True: "trained on these weights",
        False: "trained on OTHER weights: its answers may be poor",
        None: "does not say on which weights it was trained",
    }[adapter.fits_base]
    default = ", default" if adapter.is_default else ""
    megabytes = adapter.nbytes / 1e6
    return f"    adapter {adapter.name}{default}: rank up to {adapter.rank}, {megabytes:.1f} MB, {fits}"
