"""A training that was recorded on a small model: what the demo shows without a model.

Made by ``optiq lora train`` of dense-16m at 5 bits (see the README for the model), its dry run and its
``--progress-json``.
"""

import gzip
from importlib import resources

import msgspec

from mlx_optiq_integrations.command import CommandProgress
from mlx_optiq_tui.finetune.plan import Planned

__all__ = ["RecordedTraining", "recorded_training"]

_FILE = "training.json.gz"


class RecordedTraining(msgspec.Struct, frozen=True, kw_only=True):
    """Plan and steps."""

    planned: Planned
    steps: tuple[CommandProgress, ...]


def recorded_training() -> RecordedTraining:
    """The training."""
    data = resources.files("mlx_optiq_tui").joinpath("data", _FILE).read_bytes()
    return msgspec.json.decode(gzip.decompress(data), type=RecordedTraining)
