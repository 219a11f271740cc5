"""A damaged GGUF file is either read or refused with an error of ours; nothing else ever comes out."""

import contextlib
import tempfile
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support_gguf import random_model, write_gguf

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.models.gguf_import import plan_import


@cache
def healthy() -> tuple[bytes, int]:
    """The bytes of a good file, and where its header ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "m.gguf", random_model("llama"), "llama")
        plan = plan_import(path)
        return path.read_bytes(), min(tensor.start for tensor in plan.file.tensors.values())


def check(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        with contextlib.suppress(OptiqError):
            plan_import(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncated_header_is_refused_cleanly(data):
    content, header = healthy()
    check(content[: data.draw(st.integers(0, header))])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_header_bytes_are_read_or_refused(data):
    content, header = healthy()
    damaged = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        damaged[position] = data.draw(st.integers(0, 255))
    check(bytes(damaged))
