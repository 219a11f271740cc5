"""The body of a request as a Struct, or an error that names the field.

Litestar's own decoding drops the field's path and takes invalid UTF-8 and endless nesting for errors of the
server, so routes decode here. Knows JSON and no dialect.
"""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException

from mlx_optiq_ext.errors import RequestError

__all__ = ["decode_body", "decode_json"]

T = TypeVar("T")

_OFF_LOOP_NBYTES = 256 << 10
"""Longer bodies are decoded on another thread, so that streams go on meanwhile."""
_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_JSON = re.compile(r"application/([\w.-]+\+)?json")


async def decode_body(request: Request[Any, Any, Any], kind: type[T]) -> T:
    """Read the whole body and decode it as ``kind``.

    Raises:
        HTTPException: It is no JSON by its content type (415), or larger than the limit (413).
        RequestError: It is no JSON, or a field has the wrong type; ``param`` is the path of the field.
    """
    media_type, parameters = request.content_type
    charset = str(parameters.get("charset", "utf-8")).lower()
    if not _JSON.fullmatch(media_type.lower()) or charset not in ("utf-8", "utf8", "us-ascii"):
        found = request.headers.get("content-type", "nothing")
        raise HTTPException(f"content-type is {found!r}; send application/json in UTF-8", status_code=415)
    data = await request.body()
    if len(data) > _OFF_LOOP_NBYTES:
        return await asyncio.to_thread(decode_json, data, kind)
    return decode_json(data, kind)


def decode_json(data: bytes | str, kind: type[T]) -> T:
    """Decode JSON as ``kind``.

    Raises:
        RequestError: As :func:`decode_body` says.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        place = _PLACE.search(message)
        param = place.group(1) if place else None
        raise RequestError(message.replace("`$.", "`"), param=param or None) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
