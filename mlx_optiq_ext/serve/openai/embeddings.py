"""Vectors of the served model as the OpenAI dialect tells them.

Source: OpenAI API reference, "Embeddings".
"""

import array
import base64
import math
import sys
from typing import Any

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.openai.schema import EmbeddingRequest
from mlx_optiq_ext.types.port import Embeddings

__all__ = ["embeddings_document"]


def embeddings_document(found: Embeddings, request: EmbeddingRequest) -> dict[str, Any]:
    """Write the vectors as asked: as numbers or base64 of little-endian float32, shortened where asked.

    Raises:
        RequestError: More dimensions are asked for than there are.
    """
    rows = [
        {"object": "embedding", "index": index, "embedding": _encoded(_shortened(vector, request), request)}
        for index, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return {"object": "list", "data": rows, "model": found.model, "usage": usage}


def _shortened(vector: tuple[float, ...], request: EmbeddingRequest) -> tuple[float, ...]:
    """The first numbers, of unit length again."""
    wanted = request.dimensions
    if wanted is None or wanted == len(vector):
        return vector
    if wanted > len(vector):
        raise RequestError(f"this model's vectors have {len(vector)} dimensions", param="dimensions")
    head = vector[:wanted]
    length = math.hypot(*head) or 1.0
    return tuple(value / length for value in head)


def _encoded(vector: tuple[float, ...], request: EmbeddingRequest) -> str | tuple[float, ...]:
    if request.encoding_format == "float":
        return vector
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
