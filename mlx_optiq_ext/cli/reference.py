"""Write llms.txt and the golden help texts from the code; compare them with ``--check``.

``python -m mlx_optiq_ext.cli.reference [--check]`` from the root of the repository, or ``make docs``. Knows
the layout of the repository; never called by an installed command.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_optiq_ext.cli.docstrings import describe_module, module_docstring
from mlx_optiq_ext.cli.main import COMMANDS, Command, HelpFormatter, command_parser, summary
from mlx_optiq_ext.cli.reference_http import http_reference
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options
from mlx_optiq_ext.types.options import ConvertOptions

__all__ = ["generated_files", "main"]

_LAYERS = (
    "types",
    "formats",
    "hub",
    "models",
    "measure",
    "allocate",
    "quant",
    "kv",
    "lora",
    "adapters",
    "eval",
    "convert",
    "patches",
)
"""Their public names are described; ``engine`` and ``serve`` are reached over HTTP."""
_HEAD = """\
# mlx-optiq-ext

> Make, tune and serve local language models with MLX, as an extension of mlx-lm. One measurement decides
> which tensors get how many bits, how the KV cache is stored and what rank an adapter's modules get;
> checkpoints are ordinary ones that stock mlx-lm loads; one server speaks the OpenAI and Anthropic APIs.

This file is the whole reference, generated from the code by `make docs`; do not edit it.

Terms: `bits` nominal width of a code; `bpw` stored bits per weight, everything counted (scales, biases,
unquantized tensors); `choice` bits + group size + mode, written `4g64`, `mxfp4`, `nvfp4`, `mxfp8`, `keep`;
`unit` one tensor, or several that must be stored alike; `probe` one unit at one choice; `divergence`
KL(reference ‖ changed), nats per token; `pin` a forced choice; `bit map` path → choice.

Contents: Commands, Recipes, HTTP API, Errors and exit codes, File formats, Python API. More in README.md
(start here) and in docs/, a page a subject.
"""


def generated_files(root: Path) -> dict[Path, str]:
    """Build every generated text.

    Args:
        root: Root of the repository.
    Returns:
        Path below ``root`` → full content.
    """
    golden = Path("tests/golden/help")
    files = {
        golden / f"{command.name.replace(' ', '-')}.txt": _help_text(command) for command in COMMANDS.values()
    }
    files[Path("llms.txt")] = "\n".join(_reference(root / "mlx_optiq_ext")).rstrip() + "\n"
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated files, or with ``--check`` list those that differ and return 1."""
    parser = argparse.ArgumentParser(description="Generate llms.txt and the golden help texts.")
    parser.add_argument("--check", action="store_true", help="Compare only.")
    check_only = parser.parse_args(argv).check
    root = Path(__file__).resolve().parents[2]
    stale = {
        path: text
        for path, text in generated_files(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        sys.stdout.write(f"{'stale' if check_only else 'written'}: {path}\n")
        if not check_only:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
    return 1 if stale and check_only else 0


def _help_text(command: Command) -> str:
    try:
        return command_parser(command)[0].format_help()
    except UsageError as error:
        return f"{error}\n"


def _reference(package: Path) -> Iterator[str]:
    yield _HEAD
    yield "## Commands\n"
    for command in COMMANDS.values():
        yield from _command(command)
    yield "### mlx_lm.convert --quant-predicate optiq\n"
    yield (
        "Stock mlx-lm's own command, after a plain `pip install`: its parameters, and ours with a prefix. "
        'The Python call\n`mlx_lm.convert(path, quant_predicate="optiq", optiq_target_bpw=5.0)` takes the '
        "same as keywords.\n"
    )
    yield f"{_indented(_stock_options())}\n"
    yield _below("docs/recipes.md", package)
    yield "## HTTP API\n"
    yield (
        "Of `optiq serve`, by default on http://127.0.0.1:8080; more in docs/serving.md. Unknown fields are "
        "ignored,\nwrong ones answered with 400 in the dialect's shape. `stream: true` streams server-sent "
        "events.\n`/schema/openapi.json` has it all.\n"
    )
    yield from http_reference()
    yield "\n## Errors and exit codes\n"
    yield f"{_indented(module_docstring(package / 'errors.py'))}\n"
    yield (
        "Other exit codes: 0 success, 1 unexpected error (or `optiq doctor` found something broken), "
        "130 interrupted.\nWith `--json` an error is the one document on stdout: "
        '`{"error": {"type", "message", "exit_code"}}`.\n'
    )
    yield _below("docs/formats.md", package)
    yield "## Python API\n"
    described = [
        (_dotted(path, package), module_docstring(path), text)
        for path in [package / "__init__.py", *_modules(package)]
        if (text := describe_module(path))
    ]
    for name, docstring, _ in described:
        yield f"- `{name}`: {docstring.splitlines()[0]}"
    for name, docstring, text in described:
        yield f"\n### {name}\n\n{docstring}\n\n{_indented(text)}"


def _below(document: str, package: Path) -> str:
    """A document as a chapter: its headings one level down, its links as seen from the root."""
    text = (package.parent / document).read_text(encoding="utf-8")
    return re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE).replace("](../", "](")


def _command(command: Command) -> Iterator[str]:
    yield f"### optiq {command.name}\n"
    yield f"{summary(command)}.\n"
    yield f"{_indented(_help_text(command).rstrip())}\n"


def _stock_options() -> str:
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, formatter_class=HelpFormatter)
    add_options(parser.add_argument_group("options"), ConvertOptions, prefix="optiq-")
    return parser.format_help().strip()


def _modules(package: Path) -> Iterator[Path]:
    yield package / "blas.py"
    for layer in _LAYERS:
        yield from sorted(path for path in (package / layer).rglob("*.py") if path.name != "__init__.py")


def _dotted(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


if __name__ == "__main__":
    sys.exit(main())
