"""The commands of the quantize screen: what is started for what was chosen, and where it writes.

Knows command lines and files, no process. Called by the quantize screen.
"""

import shlex
from pathlib import Path

import msgspec

from mlx_optiq_ext.types.options import AllocateOptions

__all__ = [
    "Places",
    "convert_words",
    "kv_words",
    "measure_words",
    "places_of",
    "report_words",
    "score_words",
    "shell_line",
]


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where the work on one model goes."""

    table: str
    """Sensitivity file."""
    out: str
    """Converted folder."""

    @property
    def report(self) -> str:
        """The HTML report beside the converted folder."""
        return f"{self.out.rstrip('/')}.html"


def places_of(name: str, folder: Path, bpw: float) -> Places:
    """Names in a folder, from the model's name and the budget.

    Args:
        name: Short name of the model.
        folder: To work in.
        bpw: Budget in stored bits per weight.
    """
    return Places(
        table=str(folder / f"{name}.sensitivity.json"), out=str(folder / f"{name}-optiq-{bpw:g}bpw")
    )


def measure_words(model: str, table: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """``optiq measure``; a stopped one goes on.

    Args:
        model: Folder or Hub id.
        table: File to write.
        options: Flags, from a form.
    """
    return ("measure", model, "-o", table, *options)


def convert_words(model: str, table: str, out: str, options: AllocateOptions) -> tuple[str, ...]:
    """``optiq convert`` with what was measured, at the budget of the slider and with what was wished."""
    words = ("convert", model, "-o", out, "--sensitivity", table, "--target-bpw", f"{options.target_bpw:g}")
    pins = tuple(word for pin in options.pin for word in ("--pin", pin))
    return (*words, *pins, *(("--protect", options.protect) if options.protect != "none" else ()))


def shell_line(words: tuple[str, ...]) -> str:
    """A command as a person would type it."""
    return shlex.join(("optiq", *words))


def kv_words(model: str, out: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
    """``optiq kv-cache``; a measurement that is in the folder already serves every budget.

    Args:
        model: Folder or Hub id.
        out: Folder for the configuration.
        options: Flags, from a form.
    """
    return ("kv-cache", model, "-o", out, *options)


def score_words(model: str, out: str, uniform: str) -> tuple[str, ...]:
    """``optiq score`` of the result, against uniform choices too."""
    return ("score", model, out, *(("--uniform", uniform) if uniform else ()))


def report_words(out: str, file: str) -> tuple[str, ...]:
    """``optiq report`` as one HTML file, which replaces an older one."""
    return ("report", out, "--format", "html", "--out", file)
