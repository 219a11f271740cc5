"""Serve models over the OpenAI and Anthropic APIs.

One process answers /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models and
/v1/embeddings, several requests at once, and shares the prefixes that they have in common. It listens on this
machine alone unless --host says otherwise, and then needs a key in OPTIQ_API_KEY. Ctrl-C or SIGTERM lets
running answers end.
"""

import argparse
import logging

import msgspec

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import EngineStatus, ServedModel

__all__ = ["Serving", "add_arguments", "run"]

_MODULES = ("mlx_lm.models.base", "mlx_lm.models.cache")
"""Of mlx-lm, whose patches mixed-precision caches need."""


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints once the server listens."""

    url: str
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
        from mlx_optiq_ext.serve.auth import require_key_for
        from mlx_optiq_ext.serve.run_server import require_free_address, run_server
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the server needs {error.name}; install it with `pip install 'mlx-optiq-ext[serve]'`"
        ) from error
    require_key_for(options.host, key)
    require_free_address(options.host, options.port)
    # Deferred: everything above answers without MLX.
    from mlx_optiq_ext.cli.served_models import find_models
    from mlx_optiq_ext.engine.engine import LocalEngine
    from mlx_optiq_ext.patches.registry import activate

    for module in _MODULES:
        activate(module)
    _log_to_stderr(quiet=getattr(args, "quiet", False))
    specs = find_models(options, console.progress)
    engine = LocalEngine(specs, options, progress=console.progress)
    engine.start()
    app = create_app(engine, options, key)

    def listening(url: str) -> None:
        status = engine.status()
        console.result(
            Serving(
                url=url,
                models=status.models,
                memory_limit_nbytes=status.memory_limit_nbytes,
                needs_key=key is not None,
            ),
            _banner(url, status, needs_key=key is not None),
        )

    return run_server(app, engine, options, on_listening=listening)


def _log_to_stderr(*, quiet: bool) -> None:
    """Show what the server says, one line each with the time."""
    logging.basicConfig(force=True, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mlx_optiq_ext").setLevel(logging.WARNING if quiet else logging.INFO)


def _banner(url: str, status: EngineStatus, *, needs_key: bool) -> str:
    """What is on, and where."""
    gb = 1e9
    lines = [f"optiq serves on {url}" + (" (API key needed)" if needs_key else "")]
    for model in status.models:
        if not model.loaded:
            lines.append(f"  {model.id}: loaded when a request names it")
            continue
        bits = f"{model.bpw:.2f} bits per weight" if model.bpw else "unquantized weights"
        cache = f"{model.kv_bits:.2f} bits per cached number" if model.kv_bits else "full-precision KV cache"
        lines.append(
            f"  {model.id}: {model.weights_nbytes / gb:.2f} GB, {bits}, {cache}, context {model.context:,}"
        )
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
