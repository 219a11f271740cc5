"""What ``optiq serve`` lets a user set; flags and the reference derive from it."""

from typing import Annotated, Literal

import msgspec

__all__ = ["ServeOptions"]


def _d(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models are served."""

    model: Annotated[str | None, _d("Hub repository or folder of the model that answers.")] = None
    models_dir: Annotated[
        str | None, _d("Folder of model folders: each can be named in a request and is loaded when it is.")
    ] = None
    demo_model: Annotated[bool, _d("Fetch and serve a real small model (SmolLM2-135M-Instruct).")] = False
    revision: Annotated[str | None, _d("Hub revision of --model (branch, tag or commit).")] = None
    alias: Annotated[
        tuple[str, ...],
        _d("NAME or NAME=MODEL, repeatable: another name for a model. Unknown names reach --model anyway."),
    ] = ()
    strict_names: Annotated[bool, _d("Answer 404 to unknown model names.")] = False
    adapter: Annotated[
        tuple[str, ...],
        _d("NAME=DIR or MODEL:NAME=DIR, repeatable: mount an adapter (a folder or a Hub id) under a name."),
    ] = ()
    adapters_dir: Annotated[
        tuple[str, ...], _d("Folder from which adapters may be mounted while the server runs, repeatable.")
    ] = ()
    kv_config: Annotated[str | None, _d("kv_config.json of `optiq kv-cache`, for --model.")] = None
    kv_recent: (
        Annotated[
            int, msgspec.Meta(ge=0, description="Newest tokens to keep in full precision; as in the file.")
        ]
        | None
    ) = None
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"],
        _d("Type of unquantized tensors while serving; auto: as stored, float32 on a CPU."),
    ] = "auto"
    host: Annotated[str, _d("Address to listen on; any but a loopback one needs an API key.")] = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8080
    api_key_file: Annotated[
        str | None, _d("File with the API key, in place of the variable OPTIQ_API_KEY.")
    ] = None
    allow_host: Annotated[
        tuple[str, ...], _d("Host name that requests may be addressed to, repeatable (loopback ones always).")
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...], _d("Origin of a web page that may call this server, repeatable; none by default.")
    ] = ()
    context: (
        Annotated[
            int, msgspec.Meta(ge=64, description="Tokens of prompt and answer; the model's own if less.")
        ]
        | None
    ) = None
    memory: Annotated[
        str | None,
        _d("Ceiling of weights, KV and prefix cache: 12GB. Default: three quarters of the memory."),
    ] = None
    max_rows: Annotated[int, msgspec.Meta(ge=1, le=256, description="Requests that decode together.")] = 16
    max_queue: Annotated[int, msgspec.Meta(ge=0, description="Requests that may wait; then 429.")] = 64
    prefill_step: Annotated[
        int, msgspec.Meta(ge=16, le=8192, description="Prompt tokens per step while no other row decodes.")
    ] = 2048
    prompt_cache: Annotated[
        str | None, _d("Ceiling of the prefix cache: 2GB; 0 turns it off. Default: a quarter of --memory.")
    ] = None
    prompt_cache_dir: Annotated[
        str | None, _d("Folder in which prefixes survive a restart, as stored in memory.")
    ] = None
    prompt_cache_disk: Annotated[str, _d("Ceiling of that folder.")] = "10GB"
    reasoning: Annotated[
        Literal["auto", "on", "off"], _d("Thinking where a request says nothing of it; auto: the template's.")
    ] = "auto"
    max_tokens: (
        Annotated[int, msgspec.Meta(ge=1, description="Answer tokens where a request names no limit.")] | None
    ) = None
    temperature: (
        Annotated[
            float, msgspec.Meta(ge=0.0, le=2.0, description="Where a request names none; the model's own.")
        ]
        | None
    ) = None
    top_p: (
        Annotated[
            float, msgspec.Meta(gt=0.0, le=1.0, description="Where a request names none; the model's own.")
        ]
        | None
    ) = None
    image_urls: Annotated[bool, _d("Fetch images that requests name by URL, from public addresses only.")] = (
        False
    )
    max_body: Annotated[str, _d("Largest request body.")] = "64MB"
    timeout_s: Annotated[
        float, msgspec.Meta(gt=0.0, description="Seconds until a whole request must have arrived.")
    ] = 60.0
    drain_s: Annotated[
        float, msgspec.Meta(ge=0.0, description="Seconds that running requests get after SIGTERM.")
    ] = 30.0
    idle_unload_s: (
        Annotated[float, msgspec.Meta(gt=0.0, description="Unload a model after this many idle seconds.")]
        | None
    ) = None
    log_level: Annotated[
        Literal["error", "warning", "info", "debug"],
        _d("What is logged on stderr; info: a line when a request starts and one when it ends."),
    ] = "info"
    trust_remote_code: Annotated[bool, _d("Run model code that comes with the checkpoint.")] = False
