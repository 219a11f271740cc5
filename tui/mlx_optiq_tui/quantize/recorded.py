"""A sensitivity table that was measured of a small model: what the demo shows without a model.

Made by ``optiq measure dense-16m`` (see the README for the model), without values by domain, and compressed.
"""

import gzip
from importlib import resources

from mlx_optiq_ext.formats.sensitivity import decode_sensitivity
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["recorded_table"]

_FILE = "sensitivity.json.gz"


def recorded_table() -> SensitivityTable:
    """The table."""
    data = resources.files("mlx_optiq_tui").joinpath("data", _FILE).read_bytes()
    return decode_sensitivity(gzip.decompress(data), _FILE)
