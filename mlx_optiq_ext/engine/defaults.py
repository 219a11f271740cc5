"""Sampling of requests that say nothing of it. Called by ``served``."""

import json
import logging
from pathlib import Path
from typing import Any

from mlx_optiq_ext.types.chat import Sampling
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["default_sampling"]

_TEMPERATURE = 0.7
"""Where neither the request, nor the user, nor the model says one."""
_log = logging.getLogger(__name__)


def default_sampling(folder: Path, options: ServeOptions) -> Sampling:
    """Sampling where a request says nothing: what the user set, else generation_config.json of the model."""
    own: Any = {}
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            own = json.loads(file.read_text("utf-8"))
        except ValueError:
            _log.warning("%s: generation_config.json is not JSON; its sampling is not used", folder.name)
    own = own if isinstance(own, dict) else {}
    return Sampling(
        temperature=_number(options.temperature, own.get("temperature"), _TEMPERATURE),
        top_p=_number(options.top_p, own.get("top_p"), 1.0),
        top_k=int(_number(own.get("top_k"), 0)),
        min_p=_number(own.get("min_p"), 0.0),
    )


def _number(*candidates: Any) -> float:
    return next(float(value) for value in candidates if isinstance(value, int | float))
