"""Values that describe a model and where it came from."""

import msgspec

__all__ = ["ModelRef"]


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """A model folder on this machine, and what the user called it."""

    path: str
    """Absolute path of the folder with config.json and the weights."""
    source: str
    """Repository id or folder as given."""
    revision: str = ""
    """Commit the Hub resolved to; empty for a folder."""
    is_local: bool = True
