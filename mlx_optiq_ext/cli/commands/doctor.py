"""Check this machine and installation, and say what would help.

The exit code is 1 when something is broken; notes do not count.
"""

import argparse
from pathlib import Path

from mlx_optiq_ext.cli import backend, health, kernels
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.health import Finding
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.types.options import DoctorOptions

__all__ = ["add_arguments", "examine", "run"]

_SIGNS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``optiq doctor``."""
    add_options(parser, DoctorOptions)


def run(args: argparse.Namespace) -> int:
    """Run every check and print what was found; 1 where something is broken."""
    console = Console.from_args(args)
    options = options_from(args, DoctorOptions)
    findings = examine(network=options.network)
    broken = any(finding.state == "broken" for finding in findings)
    console.result({"healthy": not broken, "findings": findings}, _as_text(findings, with_fix=options.fix))
    return 1 if broken else 0


def examine(*, network: bool = False) -> list[Finding]:
    """Run all checks, cheapest first.

    Args:
        network: Also ask whether the Hub answers (at most three seconds).
    """
    findings = [health.check_platform(), health.check_python(), *health.check_versions()]
    findings += [health.check_memory(), health.check_disk(Path.cwd())]
    findings.append(backend.check_back_end())
    device = kernels.check_device()
    findings.append(device)
    if device.state != "broken":
        findings += [kernels.check_blas(), *kernels.check_kernels(), *kernels.check_patches()]
    if network:
        findings.append(health.check_hub())
    return findings


def _as_text(findings: list[Finding], *, with_fix: bool) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_SIGNS[finding.state]:<7s} {finding.name:<{width}s}  {finding.found}")
        if finding.fix and (with_fix or finding.state == "broken"):
            lines.append(f"{'':<7s} {'':<{width}s}  → {finding.fix}")
    unsaid = sum(bool(finding.fix) for finding in findings if finding.state == "note")
    if unsaid and not with_fix:
        lines.append(f"\n{unsaid} note{'s' if unsaid > 1 else ''}: --fix says what would help")
    return "\n".join(lines)
