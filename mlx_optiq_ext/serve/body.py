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
from mlx_optiq_ext.serve.wrong_fields import field_error, path_of

__all__ = ["decode_body", "decode_json"]

T = TypeVar("T")

_OFF_LOOP_NBYTES = 256 << 10
"""Longer bodies are decoded on another thread, so that streams go on meanwhile."""
_MOST_WHOLE = 16
"""More fields than any request has; each costs a conversion of the whole body."""
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
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
    """Decode JSON as ``kind``; ``5.0`` is an integer too.

    Raises:
        RequestError: As :func:`decode_body` says.
    """
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return _with_whole_numbers(msgspec.json.decode(data), kind)
    except msgspec.ValidationError as error:
        raise field_error(error, data, kind) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None


def _with_whole_numbers(tree: Any, kind: type[T]) -> T:
    """Convert; numbers without a fraction, where an integer is expected, become integers, if they are few."""
    for _ in range(_MOST_WHOLE):
        try:
            return msgspec.convert(tree, kind)
        except msgspec.ValidationError as error:
            if not _make_whole(tree, path_of(error)):
                raise
    return msgspec.convert(tree, kind)


def _make_whole(tree: Any, path: str) -> bool:
    """Whether there was a whole number at a path; it is an integer now."""
    steps = [int(index) if index else name for index, name in _STEP.findall(path)]
    for step in steps[:-1]:
        tree = tree[step]
    if not steps or not isinstance(value := tree[steps[-1]], float) or not value.is_integer():
        return False
    tree[steps[-1]] = int(value)
    return True
