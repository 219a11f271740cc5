"""Every test runs as the command line does: with the fast BLAS in the process before mlx."""

import logging
from collections.abc import Iterator

import pytest

from mlx_optiq_ext.blas import preload_blas

preload_blas()


@pytest.fixture(autouse=True)
def _no_log_outlives_its_stream() -> Iterator[None]:
    """Commands that run in this process log to the stderr of their test, which is closed after it."""
    yield
    for handler in [each for each in logging.root.handlers if type(each) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
