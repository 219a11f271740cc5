"""Python source → reference text: signatures and docstrings of what a module makes public.

Reads the source and imports nothing, so the reference can be built without MLX and is the same on every
Python. Called by :mod:`mlx_optiq_ext.cli.reference`.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

__all__ = ["describe_module", "module_docstring"]

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_docstring(path: Path) -> str:
    """Docstring of a module, or an empty string."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def describe_module(path: Path) -> str:
    """List the names in a module's ``__all__`` with signature and docstring, in order of definition.

    Args:
        path: A Python file.
    Returns:
        Plain text, indented by four spaces per level; empty where the module has no ``__all__``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = _public_names(tree)
    return "\n\n".join(
        text for node, note in _with_notes(tree.body) if (text := _describe(node, note, public))
    )


def _public_names(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and _target(node) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _with_notes(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Pair each statement with the string that stands directly below it."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        is_note = (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
        yield node, inspect.cleandoc(following.value.value) if is_note else ""  # type: ignore[union-attr]


def _describe(node: ast.stmt, note: str, public: set[str] | None) -> str:
    """Describe one statement; ``public=None`` takes every name without a leading underscore."""
    if isinstance(node, _Function) and _shown(node.name, public):
        return _join(_signature(node), ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef) and _shown(node.name, public):
        return _describe_class(node)
    if isinstance(node, ast.Assign | ast.AnnAssign) and _shown(_target(node), public):
        return _join(_declaration(node), note)
    return ""


def _describe_class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [ast.get_docstring(node) or ""]
    parts += [_describe(member, note, None) for member, note in _with_notes(node.body)]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    return _join(head, "\n".join(filter(None, parts)))


def _signature(node: _Function) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    return f"{decorators}def {node.name}({ast.unparse(node.args)}){returns}"


def _declaration(node: ast.Assign | ast.AnnAssign) -> str:
    if isinstance(node, ast.Assign):
        value = ast.unparse(node.value)
        return f"{_target(node)} = {value}" if len(value) <= 80 else _target(node)
    default = f" = {ast.unparse(node.value)}" if node.value and len(ast.unparse(node.value)) <= 80 else ""
    annotation, description = _annotation(node.annotation)
    line = f"{_target(node)}: {annotation}{default}"
    return _join(line, description) if description else line


def _annotation(node: ast.expr) -> tuple[str, str]:
    """Split ``Annotated[T, _d("text")]``, also within a union, into ``T`` and the text; bounds stay out."""
    plain = _Plain()
    return ast.unparse(plain.visit(node)), " ".join(plain.descriptions)


class _Plain(ast.NodeTransformer):
    """Replaces ``Annotated[T, ...]`` by ``T`` and keeps the texts it held."""

    def __init__(self) -> None:
        self.descriptions: list[str] = []

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Visit one subscript."""
        if ast.unparse(node.value) != "Annotated" or not isinstance(node.slice, ast.Tuple):
            return node
        plain, *extras = node.slice.elts
        self.descriptions += [
            part.value
            for extra in extras
            for part in ast.walk(extra)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
        return plain


def _shown(name: str, public: set[str] | None) -> bool:
    return name in public if public is not None else bool(name) and not name.startswith("_")


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else ""


def _join(head: str, body: str) -> str:
    indented = "\n".join(f"    {line}" if line else "" for line in body.split("\n"))
    return f"{head}\n{indented}" if body else head
