"""Sensitivity-driven mixed-precision quantization for MLX. Importing this package changes nothing."""

__version__ = "0.1.0"

__all__ = ["__version__", "install"]


def install() -> None:
    """Teach the mlx-lm of this process the "optiq" recipe, where the start-up file was not read.

    Needed after ``pip install --target``, under ``python -S`` and in frozen applications. Modules already
    loaded are extended in place, later ones when they load. Idempotent; nothing happens under
    ``MLX_OPTIQ_DISABLE=1``.

    Raises:
        PatchError: This mlx-lm does not offer what the extension needs; mlx-lm is left untouched.
    """
    from mlx_optiq_ext import _hook  # deferred: importing the package changes nothing and costs nothing

    _hook.install(explicit=True)
