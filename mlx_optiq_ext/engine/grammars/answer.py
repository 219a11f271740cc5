"""The grammar of a whole answer: a form that the request asks for, calls of its tools, or either of them."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from mlx_optiq_ext.engine.grammars.json_calls import hermes, kimi_k2, mistral_headers, mistral_list
from mlx_optiq_ext.engine.grammars.lark import ANYTHING, Grammar, escaped, one_of, searched
from mlx_optiq_ext.engine.grammars.literal_calls import function_gemma, gemma4, pythonic
from mlx_optiq_ext.engine.grammars.tag_calls import (
    GLM,
    KIMI_K3,
    LONGCAT,
    MINICPM5,
    MINIMAX_M2,
    MUSE_SPARK,
    QWEN3_CODER,
)
from mlx_optiq_ext.types.chat import Constraint, ToolSpec

__all__ = [
    "SYNTAXES",
    "AnswerForm",
    "CallSyntax",
    "Envelope",
    "answer_grammar",
    "form_grammar",
    "without",
]

CallSyntax = Callable[..., str]
"""``syntax(grammar, tools, *, parallel) -> expression`` of one or more calls."""

SYNTAXES: dict[str, CallSyntax] = {
    "function_gemma": function_gemma,
    "gemma4": gemma4,
    "glm47": GLM,
    "json_tools": hermes,
    "kimi_k2": kimi_k2,
    "kimi_k3": KIMI_K3,
    "laguna": GLM,
    "longcat": LONGCAT,
    "minicpm5": MINICPM5,
    "minimax_m2": MINIMAX_M2,
    "mistral": mistral_list,
    "mistral_headers": mistral_headers,
    "muse_spark": MUSE_SPARK,
    "pythonic": pythonic,
    "qwen3_coder": QWEN3_CODER,
}
"""By mlx-lm's name of the family's parser; Mistral's templates have two forms."""

_SPACE = r"/[ \n]{0,4}/"


class AnswerForm(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must be; with both fields, either of them."""

    constraint: Constraint | None = None
    tools: tuple[ToolSpec, ...] = ()
    """Calls of these."""
    parallel: bool = True


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """What a family may write around what it says; most write nothing."""

    before: str = ""
    after: str = ""
    is_addressed: bool = False
    """A turn is several messages, each with a header that names whom it is to, reasoning among them."""


_BARE = Envelope()


def answer_grammar(
    form: AnswerForm, family: str, markers: Mapping[str, int], envelope: Envelope = _BARE
) -> str:
    """Grammar of an answer, in llguidance's form of several grammars.

    Args:
        form: With a constraint, tools, or both.
        family: A name of :data:`SYNTAXES`.
        markers: Tokens of the model that stand for themselves, by their text.
        envelope: Of the family.
    """
    grammar = Grammar(markers)
    nested: list[dict[str, str]] = []
    options = []
    if form.tools:
        calls = SYNTAXES[family](grammar, form.tools, parallel=form.parallel)
        header = _header(grammar, r"[^<\s]{1,64}/ & ~/(?s:.*)to=(self|user)") if envelope.is_addressed else ""
        options.append(f"{header} {grammar.rule(_SPACE)} {calls}".strip())
    if form.constraint is not None:
        said = _constrained(grammar, form.constraint, nested)
        before, after = (
            f"({grammar.literal(each)})?" if each else "" for each in (envelope.before, envelope.after)
        )
        before = _header(grammar, "(user|commentary)") if envelope.is_addressed else before
        options.append(f"{before} {said} {after}".strip())
    start = one_of([grammar.rule(option) for option in options])
    if envelope.is_addressed:
        begin = f"{grammar.terminal('/[^<]{0,40}to=self/')} {grammar.literal('<|message|>')}"
        start = f"({begin} {grammar.text_until('<|eom|>')} {grammar.literal('<|start|>')})? {start}"
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": grammar.text(start)}, *nested]})


def form_grammar(constraint: Constraint) -> str:
    """Grammar of a constraint alone, to say what is wrong with it."""
    return answer_grammar(AnswerForm(constraint=constraint), "json_tools", {})


def without(marker: str, others: Iterable[int]) -> str:
    """Grammar of any answer that does not spell a marker.

    Args:
        marker: Text without marker tokens.
        others: Marker tokens that may come.
    """
    tokens = ",".join(str(token) for token in sorted(others))
    start = f"TEXT (<[{tokens}]> TEXT)*" if tokens else "TEXT"
    rule = f"start: {start}\nTEXT: {ANYTHING} & ~/(?s:.*){escaped(marker)}(?s:.*)/\n"
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": rule}]})


def _header(grammar: Grammar, to: str) -> str:
    """The header of a message, which may be in the prompt already."""
    return f"({grammar.terminal(f'/[^<]{{0,40}}to={to}/')} {grammar.literal('<|message|>')})?"


def _constrained(grammar: Grammar, constraint: Constraint, nested: list[dict[str, str]]) -> str:
    value: Any = constraint.value
    if constraint.kind in ("json_schema", "json_object"):
        schema = {"type": "object"} if constraint.kind == "json_object" else value
        return f"{grammar.rule(_SPACE)} {grammar.json(schema)}"
    if constraint.kind == "regex":
        return grammar.rule(searched(f"^{str(value).removeprefix('^').removesuffix('$')}$"))
    nested.append({"name": "form", "lark_grammar": str(value)})
    return "@form"
