"""Whatever schema is asked for, a random model's answer within its grammar is JSON that fits it."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support_grammars import draw, family_tokenizer, matcher_of

from mlx_optiq_ext.engine.grammars.answer import AnswerForm
from mlx_optiq_ext.engine.token_bytes import token_bytes
from mlx_optiq_ext.types.chat import Constraint

Case = tuple[dict[str, Any], Callable[[Any], bool]]
"""A schema and whether a value fits it, said twice independently."""


def _integer(least: int, span: int) -> Case:
    most = least + span
    schema = {"type": "integer", "minimum": least, "maximum": most}
    return schema, lambda value: type(value) is int and least <= value <= most


def _string(least: int, span: int) -> Case:
    most = least + span
    schema = {"type": "string", "minLength": least, "maxLength": most}
    return schema, lambda value: isinstance(value, str) and least <= len(value) <= most


def _enum(values: list[Any]) -> Case:
    # JSON tells true from 1; Python's == does not.
    return {"enum": values}, lambda value: json.dumps(value) in {json.dumps(each) for each in values}


_SCALARS = st.one_of(
    st.builds(_integer, st.integers(-50, 50), st.integers(0, 40)),
    st.builds(_string, st.integers(0, 3), st.integers(0, 4)),
    st.builds(
        _enum,
        st.lists(
            st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=4)),
            min_size=1,
            max_size=3,
        ),
    ),
    st.just(({"type": "boolean"}, lambda value: isinstance(value, bool))),
    st.just(({"type": "null"}, lambda value: value is None)),
)


def _array(item: Case, least: int, span: int) -> Case:
    schema, fits = item
    most = least + span
    return (
        {"type": "array", "items": schema, "minItems": least, "maxItems": most},
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(fits, value)),
    )


def _either(options: list[Case]) -> Case:
    return (
        {"anyOf": [schema for schema, _ in options]},
        lambda value: any(fits(value) for _, fits in options),
    )


def _object(properties: dict[str, tuple[Case, bool]]) -> Case:
    required = [name for name, (_, is_required) in properties.items() if is_required]
    schema = {
        "type": "object",
        "properties": {name: schema for name, ((schema, _), _) in properties.items()},
        "required": required,
        "additionalProperties": False,
    }

    def fits(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and set(required) <= set(value) <= set(properties)
            and all(properties[name][0][1](each) for name, each in value.items())
        )

    return schema, fits


def _referring(case: Case) -> Case:
    schema, fits = case
    return (
        {
            "$defs": {"Part": schema},
            "type": "object",
            "properties": {"part": {"$ref": "#/$defs/Part"}},
            "required": ["part"],
            "additionalProperties": False,
        },
        lambda value: set(value) == {"part"} and fits(value["part"]),
    )


_CASES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.builds(_either, st.lists(inner, min_size=1, max_size=3)),
        st.builds(_object, st.dictionaries(st.text(max_size=4), st.tuples(inner, st.booleans()), max_size=3)),
    ),
    max_leaves=5,
)


@cache
def _tokenizer() -> TokenizerWrapper:
    return family_tokenizer("json_tools")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=st.one_of(_CASES, _CASES.map(_referring)), seed=st.integers(0, 999))
def test_a_random_answer_fits_its_schema(case: Case, seed: int) -> None:
    schema, fits = case
    form = AnswerForm(constraint=Constraint(kind="json_schema", value=schema))
    tokenizer = _tokenizer()
    tokens = draw(matcher_of(tokenizer, form), np.random.default_rng(seed), tokenizer.eos_token_ids)
    assert tokens is not None
    text = bytes(byte for each in tokens for byte in _bytes()[each]).decode("utf-8")
    assert fits(json.loads(text)), (schema, text)


@cache
def _bytes() -> list[bytes]:
    return token_bytes(_tokenizer(), range(len(_tokenizer())))
