"""Pictures that people attach: from a path, from pasted text that is one, from the clipboard.

Knows no conversation. What the server takes is passed on as it is, other formats become PNG. Blocks on
the disk and decodes: call it on a worker thread.
"""

import io
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
from PIL import ExifTags, Image, ImageGrab, ImageOps

from mlx_optiq_ext.errors import UsageError

__all__ = ["Picture", "clipboard_picture", "pasted_path", "read_picture"]

_TAKEN = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
_MAX_NBYTES = 20 << 20
_MAX_PIXELS = 50_000_000
_PREVIEW = 640
_APPLE = re.compile(r"\.hei[cf]$", re.IGNORECASE)
_SUFFIX = re.compile(r"\.(png|jpe?g|gif|webp|bmp|tiff?|hei[cf])$", re.IGNORECASE)


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that can be sent."""

    data: bytes
    media_type: str
    width: int
    height: int
    label: str
    preview: bytes = b""
    """A small PNG of a large picture, which a terminal would else decode each time it is drawn."""


def read_picture(path: Path) -> Picture:
    """Read a file.

    Raises:
        UsageError: Not there, too large, or no picture.
    """
    path = path.expanduser()
    try:
        # A pipe would be waited for, a device read for ever.
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file; give the path of a picture")
        with path.open("rb") as file:
            data = file.read(_MAX_NBYTES + 1)
        if len(data) > _MAX_NBYTES:
            raise UsageError(f"{path} is larger than {_MAX_NBYTES >> 20} MiB; make it smaller")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return _picture(data, path.name, str(path))


def clipboard_picture() -> Picture:
    """What the clipboard holds.

    Raises:
        UsageError: No picture, or this system's clipboard cannot be read.
    """
    try:
        held = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError, ChildProcessError) as error:
        raise UsageError(f"the clipboard cannot be read ({error}); give the path of a file") from error
    if isinstance(held, list) and held:
        return read_picture(Path(held[0]))
    if not isinstance(held, Image.Image):
        raise UsageError("the clipboard holds no picture; give the path of a file")
    return _picture(_png(held), "clipboard", "the clipboard")


def pasted_path(text: str) -> Path | None:
    """The picture that a pasted text names: a path, quoted or escaped as terminals drop it, or a file URL."""
    text = text.strip()
    if "\n" in text or not text:
        return None
    if text.startswith("file://"):
        named = unquote(urlsplit(text).path)
    else:
        try:
            words = shlex.split(text)
        except ValueError:
            return None
        named = words[0] if len(words) == 1 else text
    path = Path(named).expanduser()
    try:
        return path if path.is_absolute() and _SUFFIX.search(path.name) and path.is_file() else None
    except OSError:  # too long for a name
        return None


def _picture(data: bytes, label: str, where: str) -> Picture:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                most = f"{_MAX_PIXELS // 10**6} million"
                raise UsageError(f"{where} has {width}×{height} pixels, more than {most}; make it smaller")
            image.load()
            kind = str(image.format)
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                # Neither terminals nor models turn it.
                upright = ImageOps.exif_transpose(image)
                data, kind, (width, height) = _png(upright), "PNG", upright.size
            elif kind not in _TAKEN:
                data, kind = _png(image), "PNG"
            preview = b""
            if width * height > _PREVIEW**2:
                small = ImageOps.exif_transpose(image)
                small.thumbnail((_PREVIEW, _PREVIEW))
                preview = _png(small)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        advice = "; save it as JPEG or PNG" if _APPLE.search(where) else ""
        raise UsageError(f"{where} is no picture that can be read ({error}){advice}") from error
    return Picture(
        data=data, media_type=_TAKEN[kind], width=width, height=height, label=label, preview=preview
    )


def _png(image: Image.Image) -> bytes:
    written = io.BytesIO()
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA")).save(written, "PNG")
    return written.getvalue()
