"""What a user may set, declared once: command-line flags, validation and the reference derive from it.

Every field carries its description in ``msgspec.Meta``; bounds are checked when the Struct is decoded.
"""

from typing import Annotated, Literal

import msgspec

__all__ = [
    "AllocateOptions",
    "ConvertOptions",
    "DoctorOptions",
    "ImportGgufOptions",
    "KVCacheOptions",
    "KVScoreOptions",
    "MeasureOptions",
    "ReportOptions",
    "ScoreOptions",
]


def _d(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class MeasureOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is measured."""

    revision: Annotated[str | None, _d("Hub revision (branch, tag or commit).")] = None
    candidate_bits: Annotated[
        str, _d("Comma-separated choices: bits (2,3,4,5,6,8), BITSgGROUP, mxfp4, nvfp4, mxfp8, keep.")
    ] = "2,3,4,5,6,8"
    candidate_groups: Annotated[
        str, _d("Group sizes for choices given as bits alone (32, 64, 128), comma-separated.")
    ] = "64"
    method: Annotated[
        Literal["fisher", "kl", "static"],
        _d("fisher: one pass estimates everything; kl: one probe per tensor and choice; static: by shape."),
    ] = "fisher"
    reference: Annotated[
        Literal["auto", "resident", "stream"],
        _d("Hold the whole model in memory, or one block at a time; auto takes resident if it fits."),
    ] = "auto"
    correction: Annotated[
        Literal["none", "fast", "full"],
        _d("Rounding: none (mx.quantize), fast (importance-weighted fit), full (GPTQ with that fit)."),
    ] = "full"
    calibration: Annotated[
        str | None, _d("JSONL of {domain,text} or {domain,messages[,tools]} in place of the built-in text.")
    ] = None
    num_tokens: Annotated[
        int, msgspec.Meta(ge=64, description="Calibration tokens in all, spread evenly over domains.")
    ] = 2048
    window: Annotated[int, msgspec.Meta(ge=16, le=8192, description="Tokens per window.")] = 128
    label_samples: Annotated[
        int, msgspec.Meta(ge=1, le=16, description="Sampled labels per position (backward passes).")
    ] = 1
    probes: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Forward equivalents to spend on exact probes that check the estimates."
        ),
    ] = 8
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of label sampling.")] = 0
    resume: Annotated[bool, _d("Continue a stopped measurement with the same settings.")] = True
    trust_remote_code: Annotated[bool, _d("Run model code that comes with the checkpoint.")] = False


class AllocateOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How bits are spent."""

    target_bpw: (
        Annotated[
            float,
            msgspec.Meta(
                gt=1.0, le=33.0, description="Ceiling in stored bits per weight, everything counted."
            ),
        ]
        | None
    ) = None
    target_size: Annotated[
        str | None, _d("Ceiling of the checkpoint's weights: 4.5GB, 900MB (decimal), 4GiB.")
    ] = None
    fit: Annotated[
        str | None, _d("Memory that weights, KV cache at --context and head room must fit into: 8GB.")
    ] = None
    context: Annotated[int, msgspec.Meta(ge=1, description="Context length for --fit, in tokens.")] = 8192
    pin: Annotated[tuple[str, ...], _d("PATTERN=CHOICE, repeatable: force a choice on matching paths.")] = ()
    protect: Annotated[
        Literal["none", "edges"],
        _d("edges: the published rule (head, first and last block at the widest choice)."),
    ] = "none"
    solver: Annotated[Literal["exact", "greedy"], _d("Exact knapsack, or the greedy ascent.")] = "exact"
    speed_weight: Annotated[
        float,
        msgspec.Meta(
            ge=0.0,
            description="Nats per token that one bit less is worth, per weight that a token reads (experts: "
            "the active ones). Counts bits read, not the time of a kernel.",
        ),
    ] = 0.0


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measure, allocate, convert and verify in one; the command line flattens the two nested Structs."""

    measure: MeasureOptions = MeasureOptions()
    allocate: AllocateOptions = AllocateOptions()
    sensitivity: Annotated[
        str | None,
        _d("Use this sensitivity file instead of measuring; the --correction is that of the file."),
    ] = None
    allocation: Annotated[
        str | None,
        _d("Bit map of optiq allocate -o, edited or not, in place of a target; needs --sensitivity."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"],
        _d("Type of unquantized tensors, scales and biases."),
    ] = "auto"
    rotate_values: Annotated[
        bool,
        _d(
            "Rotate cached values in the weights (the same function): a stored KV cache then need not do it. "
            "Blocks where that is not exact are left alone and named."
        ),
    ] = False
    verify: Annotated[
        bool, _d("Reload with stock mlx-lm in a fresh process and compare plan, config and bytes.")
    ] = True
    score: Annotated[bool, _d("Measure the divergence on held-out text, against uniform at equal bits.")] = (
        True
    )
    upload_repo: Annotated[str | None, _d("Upload the result to this Hub repository.")] = None
    max_shard_gb: Annotated[float, msgspec.Meta(gt=0, description="Largest weight file in GB.")] = 5.0


class ScoreOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How checkpoints are compared with their reference."""

    held_out: Annotated[str | None, _d("JSONL like --calibration, never used for measuring.")] = None
    num_tokens: Annotated[int, msgspec.Meta(ge=64, description="Held-out tokens in all.")] = 2048
    window: Annotated[int, msgspec.Meta(ge=16, le=8192, description="Tokens per window.")] = 128
    uniform: Annotated[
        str, _d("Also score the reference quantized uniformly: comma-separated choices such as 4,5,6g32.")
    ] = ""
    trust_remote_code: Annotated[bool, _d("Run model code that comes with the checkpoint.")] = False


class KVCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a KV cache is measured and allocated."""

    revision: Annotated[str | None, _d("Hub revision (branch, tag or commit).")] = None
    target_bits: Annotated[
        float,
        msgspec.Meta(
            gt=1.0,
            le=33.0,
            description="Ceiling in stored bits per cached number, scales and biases counted.",
        ),
    ] = 5.0
    context: Annotated[
        int, msgspec.Meta(ge=64, description="Tokens of context to measure up to and to budget for.")
    ] = 4096
    candidate_bits: Annotated[
        str, _d("Comma-separated choices for keys and for values: bits (2,3,4,5,6,8) or BITSgGROUP.")
    ] = "2,3,4,5,6,8"
    candidate_groups: Annotated[
        str, _d("Group sizes along the head for choices given as bits alone (32, 64, 128).")
    ] = "32,64,128"
    rotate: Annotated[bool, _d("Centre keys and rotate keys and values before they are rounded.")] = True
    recent: Annotated[
        int, msgspec.Meta(ge=0, le=4096, description="Last tokens to keep in full precision besides.")
    ] = 0
    first: Annotated[
        int, msgspec.Meta(ge=0, le=256, description="First tokens to keep in full precision besides.")
    ] = 0
    fit: Annotated[
        str | None, _d("Memory for weights, KV cache and head room: say which context fits into it (8GB).")
    ] = None
    calibration: Annotated[
        str | None, _d("JSONL of {domain,text} or {domain,messages[,tools]} in place of the built-in text.")
    ] = None
    held_out: Annotated[str | None, _d("JSONL like --calibration, on which configurations are compared.")] = (
        None
    )
    num_tokens: Annotated[
        int, msgspec.Meta(ge=64, description="Tokens per prefix length, for measuring and for comparing.")
    ] = 4096
    label_samples: Annotated[
        int, msgspec.Meta(ge=1, le=16, description="Sampled labels per position (backward passes).")
    ] = 1
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of label sampling.")] = 0
    trust_remote_code: Annotated[bool, _d("Run model code that comes with the checkpoint.")] = False


class KVScoreOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How stored KV caches are compared with full-precision ones."""

    kv_config: Annotated[
        str | None, _d("Compare KV caches instead: this kv_config.json with the full-precision cache.")
    ] = None
    kv_uniform: Annotated[
        str,
        _d("Also compare plain uniform KV caches, neither centred nor rotated: such as 8,4,k6v4,4g32."),
    ] = ""
    context: Annotated[
        int, msgspec.Meta(ge=16, description="Tokens of context to compare at, with 256 and 1024 before it.")
    ] = 4096
    lengths: Annotated[str | None, _d("Prefix lengths in place of those of --context, comma-separated.")] = (
        None
    )
    needle: Annotated[
        bool, _d("Also hide facts in the context and look whether each cache still finds them.")
    ] = False
    seed: Annotated[int, msgspec.Meta(ge=0, description="Seed of the facts of --needle.")] = 0


class ReportOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What optiq report writes."""

    format: Annotated[Literal["terminal", "html", "png"], _d("Where the pictures go.")] = "terminal"
    out: Annotated[str | None, _d("File to write for html and png; missing folders are made.")] = None


class ImportGgufOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a GGUF file is turned into a Hugging Face folder."""

    dtype: Annotated[Literal["bfloat16", "float16", "float32"], _d("Type of the written weights.")] = (
        "bfloat16"
    )


class DoctorOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What optiq doctor checks."""

    fix: Annotated[bool, _d("Print the command that mends each finding.")] = False
    network: Annotated[bool, _d("Also ask whether the Hub answers.")] = False
