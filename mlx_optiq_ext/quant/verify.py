"""Compare a written checkpoint with its plan: config.json, bytes on disk, and what stock mlx-lm loads.

Knows nothing of how the checkpoint was made. Called by ``quant.convert`` before the output gets its final
name; a mismatch raises, and the output stays marked incomplete.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.blas import preload_blas
from mlx_optiq_ext.errors import ResourceError, UsageError, VerificationError
from mlx_optiq_ext.formats.safetensors import StoredTensor, read_folder
from mlx_optiq_ext.types.quant import BitMap, Choice
from mlx_optiq_ext.types.verify import VerifyReport

__all__ = ["compare_bytes", "compare_config", "inspect_checkpoint", "verify_checkpoint"]

_FLOATS = {"F16", "BF16", "F32"}
_SHOWN = 12
_TIMEOUT_S = 3600
"""For loading and 16 tokens of any model; only a machine that swaps or hangs takes as long."""


class _Loaded(msgspec.Struct, frozen=True):
    """What the fresh process printed."""

    mlx: str
    mlx_lm: str
    ours: list[str]
    modules: dict[str, tuple[int, int, str]]
    parameters: dict[str, tuple[str, tuple[int, ...]]]
    not_finite: list[str]
    forward: str


def verify_checkpoint(
    folder: Path, plan: BitMap, *, expected_nbytes: int | None = None, trust_remote_code: bool = False
) -> VerifyReport:
    """Check a checkpoint and refuse it on any mismatch.

    Args:
        folder: The written checkpoint.
        plan: Choice of every quantizable path, kept ones included.
        expected_nbytes: Bytes of all tensors as the allocation predicts; None leaves them unchecked.
        trust_remote_code: Let mlx-lm run a model file of the checkpoint.
    Returns:
        What was compared; its ``problems`` are empty.
    Raises:
        VerificationError: Something differs; names the paths.
        ResourceError: The fresh process was killed, or did not end.
    """
    report = inspect_checkpoint(
        folder, plan, expected_nbytes=expected_nbytes, trust_remote_code=trust_remote_code
    )
    if report.problems:
        shown = report.problems[:_SHOWN]
        more = len(report.problems) - len(shown)
        lines = "\n".join(f"  {problem}" for problem in shown) + (f"\n  and {more} more" if more else "")
        raise VerificationError(f"the checkpoint is not what was planned:\n{lines}")
    return report


def inspect_checkpoint(
    folder: Path, plan: BitMap, *, expected_nbytes: int | None = None, trust_remote_code: bool = False
) -> VerifyReport:
    """Do the comparison of :func:`verify_checkpoint` and report in place of raising.

    Raises:
        VerificationError: Nothing could be compared: unreadable files, or stock mlx-lm does not load it.
        ResourceError: The fresh process was killed, or did not end.
    Cost: every float tensor is read once, one forward of 16 tokens, start of a Python process.
    """
    started = time.monotonic()
    try:
        tensors = read_folder(folder)
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (UsageError, OSError, msgspec.MsgspecError) as error:
        raise VerificationError(f"the checkpoint cannot be read: {error}") from error
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    problems = [
        *compare_bytes(tensors, plan),
        *compare_config(config, plan),
        *_compare_index(folder, tensors, nbytes),
    ]
    if expected_nbytes is not None and nbytes != expected_nbytes:
        problems.append(f"tensors have {nbytes} bytes, the allocation says {expected_nbytes}")
    loaded = _load_stock(folder, trust_remote_code)
    problems += _compare_loaded(loaded, tensors, plan)
    return VerifyReport(
        num_paths=len(plan.choices),
        num_tensors=len(tensors),
        nbytes=nbytes,
        mlx=loaded.mlx,
        mlx_lm=loaded.mlx_lm,
        forward=loaded.forward,
        seconds=round(time.monotonic() - started, 2),
        problems=tuple(problems),
    )


def compare_bytes(tensors: dict[str, StoredTensor], plan: BitMap) -> list[str]:
    """Mismatches between the plan and what shapes and dtypes on disk imply."""
    problems = []
    for path, choice in sorted(plan.choices.items()):
        weight, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if weight is None:
            problems.append(f"{path}: no weight on disk")
        elif choice.mode == "keep":
            if scales is not None or weight.dtype not in _FLOATS:
                problems.append(f"{path}: planned keep, on disk packed")
        elif scales is None or weight.dtype != "U32":
            problems.append(f"{path}: planned {choice.label}, on disk {weight.dtype} without packing")
        else:
            problems += _compare_packed(path, choice, weight, scales, f"{path}.biases" in tensors)
    for name in sorted(tensors):
        path, _, leaf = name.rpartition(".")
        if leaf == "scales" and path not in plan.choices and f"{path}.weight" in tensors:
            problems.append(f"{path}: packed on disk, not in the plan")
    return problems


def compare_config(config: dict[str, Any], plan: BitMap) -> list[str]:
    """Mismatches between the plan and config.json's ``quantization`` (and its copy)."""
    quantized = {path: choice for path, choice in plan.choices.items() if choice.mode != "keep"}
    settings = config.get("quantization")
    if not isinstance(settings, dict):
        return ["config.json: no quantization entry"] if quantized else []
    problems = []
    if config.get("quantization_config") != settings:
        problems.append("config.json: quantization_config differs from quantization")
    problems += [
        f"config.json: quantization has no top-level {key}"
        for key in ("group_size", "bits", "mode")
        if settings.get(key) is None
    ]
    entries = {path: entry for path, entry in settings.items() if isinstance(entry, dict | bool | None)}
    for path, choice in sorted(quantized.items()):
        expected = {"group_size": choice.group_size, "bits": choice.bits, "mode": choice.mode}
        if entries.get(path) != expected:
            problems.append(
                f"{path}: planned {choice.label}, config.json has {json.dumps(entries.get(path))}"
            )
    problems += [
        f"{path}: entry in config.json, not quantized in the plan"
        for path in sorted(entries.keys() - quantized)
    ]
    return problems


def _compare_packed(
    path: str, choice: Choice, weight: StoredTensor, scales: StoredTensor, has_biases: bool
) -> list[str]:
    """Bits and group size as the shapes imply them, given that one of the two is right."""
    last = weight.shape[-1] * 32 / choice.bits
    problems = []
    if scales.shape[-1] * choice.group_size != last or scales.shape[:-1] != weight.shape[:-1]:
        found = f"weight {list(weight.shape)}, scales {list(scales.shape)}"
        problems.append(f"{path}: planned {choice.label}, on disk {found}")
    affine = choice.mode == "affine"
    if has_biases != affine or (scales.dtype in _FLOATS) != affine:
        kind = f"{scales.dtype} scales {'with' if has_biases else 'without'} biases"
        problems.append(f"{path}: planned {choice.label}, on disk {kind}")
    return problems


def _compare_index(folder: Path, tensors: dict[str, StoredTensor], nbytes: int) -> list[str]:
    path = folder / "model.safetensors.index.json"
    try:
        index = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        files, total = index["weight_map"], index["metadata"]["total_size"]
    except (OSError, msgspec.MsgspecError, KeyError, TypeError) as error:
        return [f"{path.name}: unreadable ({error!r})"]
    problems = [] if total == nbytes else [f"{path.name}: total_size {total}, on disk {nbytes}"]
    on_disk = {name: tensor.file for name, tensor in tensors.items()}
    wrong = sorted(name for name in files.keys() | on_disk.keys() if files.get(name) != on_disk.get(name))
    return problems + [f"{name}: {path.name} and files disagree" for name in wrong]


def _load_stock(folder: Path, trust_remote_code: bool) -> _Loaded:
    """Run ``verify_stock.py`` in a fresh interpreter without our start-up hook."""
    script = Path(__file__).with_name("verify_stock.py")
    blas = (preload_blas() or "").removeprefix("late: ")
    words = [str(folder), "trust" if trust_remote_code else "", blas]
    environment = {
        **os.environ,
        "MLX_OPTIQ_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    ended = _run_apart([sys.executable, "-P", str(script), *words], environment)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode != 0 or not lines:
        reason = "\n".join(ended.stderr.strip().splitlines()[-5:])
        raise VerificationError(
            f"stock mlx-lm does not load the checkpoint (exit {ended.returncode}):\n{reason}"
        )
    return msgspec.json.decode(lines[-1].encode(), type=_Loaded)


def _run_apart(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a process to its own end; one that is stopped from outside says nothing about the checkpoint."""
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"verification did not end within {_TIMEOUT_S // 60} minutes; free memory, or convert with "
            "--no-verify"
        ) from error
    if ended.returncode < 0:
        number = -ended.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        raise ResourceError(
            f"the process that verifies the checkpoint was killed ({name}), most likely for want of memory; "
            "free some, or convert with --no-verify"
        )
    return ended


def _compare_loaded(loaded: _Loaded, tensors: dict[str, StoredTensor], plan: BitMap) -> list[str]:
    problems = []
    for path, choice in sorted(plan.choices.items()):
        found = loaded.modules.get(path)
        if choice.mode == "keep":
            if found is not None:
                problems.append(f"{path}: planned keep, stock mlx-lm loads {found}")
        elif found != (choice.bits, choice.group_size, choice.mode):
            problems.append(f"{path}: planned {choice.label}, stock mlx-lm loads {found}")
    problems += [
        f"{path}: stock mlx-lm loads it packed, not in the plan"
        for path in sorted(loaded.modules.keys() - plan.choices)
    ]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | loaded.parameters.keys()):
        in_model = loaded.parameters[name][1] if name in loaded.parameters else None
        if shapes.get(name) != in_model:
            problems.append(f"{name}: on disk {shapes.get(name)}, in the loaded model {in_model}")
    problems += [f"{name}: not finite" for name in loaded.not_finite]
    if loaded.forward.startswith("failed"):
        problems.append(f"forward pass {loaded.forward}")
    if any(name.startswith("mlx_optiq_ext.patches") for name in loaded.ours):
        problems.append(f"the fresh process was not stock: it imported {', '.join(loaded.ours)}")
    return problems
