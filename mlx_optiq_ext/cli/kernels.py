"""Checks that run MLX: the device, the speed of float32 matmul, the quantized kernels, our patches of mlx-lm.

Called by ``optiq doctor``, after the fast BLAS was loaded.
"""

import time
from typing import Any, Literal

from mlx_optiq_ext.blas import BLAS_HINT, preload_blas
from mlx_optiq_ext.cli.backend import import_fix
from mlx_optiq_ext.cli.health import Finding

__all__ = ["check_blas", "check_device", "check_kernels", "check_patches"]

_SLOW_GFLOPS = 20.0
_BITS = (2, 3, 4, 5, 6, 8)
# Rounding of the stored type itself: results in that type cannot be nearer than this.
_EXACT_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 8e-3}


def check_device() -> Finding:
    """Import MLX and name the device it computes on."""
    try:
        mx = _mlx()
        device = mx.default_device()
        info = mx.device_info()
    except (ImportError, RuntimeError) as error:
        return Finding(
            name="device", state="broken", found=f"mlx does not start: {error}", fix=import_fix(str(error))
        )
    details = [str(device), str(info.get("device_name", info.get("architecture", "")))]
    if working_set := info.get("max_recommended_working_set_size"):
        details.append(f"{working_set / 1e9:.1f} GB usable")
    return Finding(name="device", state="ok", found=", ".join(filter(None, details)))


def check_blas(side: int = 1024, repeats: int = 3) -> Finding:
    """Time a float32 matrix product of ``side`` × ``side``: the best of ``repeats``, in GFLOP/s."""
    mx = _mlx()
    matrix = mx.random.normal((side, side), key=mx.random.key(0))
    mx.eval(matrix)
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(matrix @ matrix)
        best_s = min(best_s, time.perf_counter() - start)
    gflops = 2.0 * side**3 / best_s / 1e9
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    library = preload_blas()
    found = f"{gflops:.0f} GFLOP/s in float32 ({side}², best of {repeats})"
    if on_cpu:
        found += f", {library or 'no fast BLAS'}"
    slow = on_cpu and gflops < _SLOW_GFLOPS
    return Finding(name="matmul", state="note" if slow else "ok", found=found, fix=BLAS_HINT if slow else "")


def check_kernels() -> list[Finding]:
    """Compare ``quantized_matmul`` with dequantize-then-multiply in float32, per type.

    The figure is the largest relative error (Frobenius) over the affine widths, group 64, 16 × 512 × 256
    random values. Half-precision kernels that are further off than their own rounding are a note: this
    package measures in float32 there. Inexact float32 is broken.
    """
    mx = _mlx()
    return [
        _kernel_finding(name, max(_kernel_error(mx, getattr(mx, name), bits) for bits in _BITS))
        for name in _EXACT_ERROR
    ]


def check_patches() -> list[Finding]:
    """Try the effect of every extension of mlx-lm's own commands in this process."""
    try:
        # Deferred: it imports mlx-lm, which may be missing or broken.
        from mlx_optiq_ext.patches import registry

        reports = registry.report()
    except ImportError as error:
        return [Finding(name="patches", state="broken", found=str(error), fix="reinstall mlx-lm")]
    states: dict[str, Literal["ok", "note", "broken"]] = {"active": "ok", "inactive": "note"}
    return [
        Finding(
            name=f"patch {report.name}",
            state=states.get(report.state, "broken"),
            found=f"{report.state} in {report.target}, made for {report.range}",
            fix=report.detail,
        )
        for report in reports
    ]


def _kernel_finding(name: str, error: float) -> Finding:
    bound = _EXACT_ERROR[name]
    found = f"relative error {error:.1e} (rounding explains {bound:.0e})"
    if error <= bound:
        return Finding(name=f"kernels {name}", state="ok", found=found)
    if name == "float32":
        fix = "reinstall mlx: results cannot be trusted"
        return Finding(name=f"kernels {name}", state="broken", found=found, fix=fix)
    fix = "nothing to do: measurements run in float32; text generated in this type may differ a little"
    return Finding(name=f"kernels {name}", state="note", found=found, fix=fix)


def _kernel_error(mx: Any, dtype: Any, bits: int) -> float:
    """Relative error of one quantized product against the same product of its own dequantized weights."""
    keys = mx.random.split(mx.random.key(bits), 2)
    weight = mx.random.normal((256, 512), key=keys[0]).astype(dtype)
    inputs = mx.random.normal((16, 512), key=keys[1]).astype(dtype)
    packed = mx.quantize(weight, group_size=64, bits=bits)
    got = mx.quantized_matmul(inputs, *packed, transpose=True, group_size=64, bits=bits)
    exact_weight = mx.dequantize(
        *(part.astype(mx.float32) if i else part for i, part in enumerate(packed)), group_size=64, bits=bits
    )
    exact = inputs.astype(mx.float32) @ exact_weight.T
    return float((mx.linalg.norm(got.astype(mx.float32) - exact) / mx.linalg.norm(exact)).item())


def _mlx() -> Any:
    """MLX, imported late: an MLX that does not start is a finding, not a crash of the doctor."""
    import mlx.core as mx

    return mx
