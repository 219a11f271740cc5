"""``optiq/score.json``: the comparison stored beside a checkpoint."""

from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["decode_score", "encode_score", "read_score"]

_NEWEST = 1


def encode_score(report: ScoreReport) -> bytes:
    """Bytes of the file, indented and ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def decode_score(data: bytes, where: str = "score.json") -> ScoreReport:
    """Parse what :func:`encode_score` wrote.

    Args:
        data: Content of the file.
        where: Name of the file for messages.
    Raises:
        UsageError: Not a score record, or of a version newer than this package knows.
    """
    try:
        report = msgspec.json.decode(data, type=ScoreReport)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{where} is not a score record ({error}); write it anew with optiq score"
        ) from error
    if not 1 <= report.format_version <= _NEWEST:
        raise UsageError(
            f"{where} has format version {report.format_version}, this package reads up to {_NEWEST}; "
            "upgrade mlx-optiq-ext or write it anew with optiq score"
        )
    return report


def read_score(path: Path) -> ScoreReport:
    """Read a score record.

    Raises:
        UsageError: Missing, unreadable or not a score record.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); optiq score makes one") from error
    return decode_score(data, str(path))
