"""A tokenizer with every family's markers, tools to call, and a model that draws at random within a mask."""

import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support_models import byte_tokenizer

from mlx_optiq_ext.engine.grammars.answer import AnswerForm, answer_grammar
from mlx_optiq_ext.engine.vocabulary import grammar_tokenizer, llguidance, markers_of
from mlx_optiq_ext.types.chat import ToolSpec

VOCAB = 384
FAMILIES = [
    "function_gemma",
    "gemma4",
    "glm47",
    "json_tools",
    "kimi_k2",
    "kimi_k3",
    "laguna",
    "longcat",
    "minicpm5",
    "minimax_m2",
    "mistral",
    "muse_spark",
    "pythonic",
    "qwen3_coder",
]
MARKERS = {
    "function_gemma": ["<start_function_call>", "<end_function_call>", "<escape>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"],
    "glm47": ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "json_tools": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "kimi_k2": [
        f"<|tool_call{name}|>"
        for name in ("s_section_begin", "s_section_end", "_begin", "_end", "_argument_begin")
    ],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
    "longcat": ["<longcat_tool_call>", "</longcat_tool_call>", "<longcat_arg_key>", "</longcat_arg_key>"],
    "minimax_m2": ["<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "qwen3_coder": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
}
"""Added tokens of each family; the others spell their markers."""


def family_tokenizer(family: str | None, *, markers: list[str] | None = None) -> TokenizerWrapper:
    """A byte tokenizer as mlx-lm would load it for a family; None: one without tools."""
    tokenizer = byte_tokenizer(320)
    names = MARKERS.get(family or "", []) if markers is None else markers
    tokenizer.add_tokens(names)
    tokenizer.chat_template = " ".join(names)
    parser = import_module(f"mlx_lm.tool_parsers.{family}") if family else None
    return TokenizerWrapper(
        tokenizer,
        tool_parser=parser.parse_tool_call if parser else None,
        tool_call_start=parser.tool_call_start if parser else None,
        tool_call_end=parser.tool_call_end if parser else None,
    )


def as_openai(tools: tuple[ToolSpec, ...]) -> list[dict[str, Any]]:
    """Tools as templates and mlx-lm's parsers take them."""
    return [
        {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in tools
    ]


def calls_in(tokenizer: TokenizerWrapper, text: str, tools: tuple[ToolSpec, ...]) -> list[dict[str, Any]]:
    """Calls of an answer as mlx-lm's parser of the family reads them; nothing else may be in it."""
    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
    calls: list[dict[str, Any]] = []
    for part in [part for part in text.split(start) if part.strip()] if end else [text.split(start, 1)[1]]:
        body = part
        if end:
            assert part.rstrip().endswith(end), text
            body = part.rstrip().removesuffix(end)
        found = tokenizer.tool_parser(body, as_openai(tools))
        calls += found if isinstance(found, list) else [found]
    return calls


def matcher_of(tokenizer: TokenizerWrapper, form: AnswerForm, family: str = "json_tools") -> Any:
    """A matcher of a form, compiled."""
    grammar = answer_grammar(form, family, markers_of(tokenizer))
    matcher = llguidance().LLMatcher(grammar_tokenizer(tokenizer, VOCAB), grammar, log_level=0)
    assert not matcher.is_error(), (
        matcher.get_error() + "\n" + json.loads(grammar)["grammars"][0]["lark_grammar"]
    )
    return matcher


def draw(
    matcher: Any, rng: np.random.Generator, ends: set[int], liked: bytes = b'"}]>,0', limit: int = 3000
) -> list[int] | None:
    """Tokens of a random answer within a grammar, its end left out; None: the limit came before the end.

    Args:
        liked: Bytes that are likelier than others, so that strings and lists come to an end.
    """
    alphabet = byte_tokenizer(320)
    favourites = alphabet.convert_tokens_to_ids([chr(byte) for byte in liked])
    tokens: list[int] = []
    for _ in range(limit):
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        scores = rng.gumbel(size=len(bits)) + np.where(bits, 0.0, -np.inf)
        scores[favourites] += 2.0
        scores[sorted(ends)] += 1.0
        token = int(np.argmax(scores))
        assert bits[token]
        assert matcher.consume_token(token), matcher.get_error()
        if token in ends:
            return tokens
        tokens.append(token)
    return None


def run_alone(
    processor: Callable[[mx.array, mx.array], mx.array],
    prompt: list[int],
    ends: set[int],
    rng: np.random.Generator,
    limit: int = 2000,
) -> list[int]:
    """Tokens that a random model draws under a processor, its end left out."""
    tokens: list[int] = []
    for _ in range(limit):
        logits = mx.array(rng.gumbel(size=(1, VOCAB)).astype(np.float32) * 2)
        out = processor(mx.array(prompt + tokens, dtype=mx.int32), logits)
        token = int(mx.argmax(out[0]).item())
        assert float(out[0, token].item()) > float("-inf")
        if token in ends:
            break
        tokens.append(token)
    return tokens
