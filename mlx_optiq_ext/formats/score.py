"""``optiq/score.json``: the comparison stored beside a checkpoint."""

from pathlib import Path

import msgspec

from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_ext.types.kv import KVScoreReport
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["decode_score", "encode_score", "read_score"]

_FORM = RecordForm(name="score record", remedy="write it anew with `optiq score`")


def encode_score(report: ScoreReport | KVScoreReport) -> bytes:
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
    return convert_record(parse_json(data, where, _FORM), ScoreReport, where, _FORM)


def read_score(path: Path) -> ScoreReport:
    """Read a score record.

    Raises:
        UsageError: Missing, unreadable or not a score record.
    """
    return decode_score(read_record(path, _FORM), str(path))
