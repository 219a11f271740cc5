"""A tokenizer as constrained decoding needs it: bytes of every token, and markers apart from text.

The one file that makes llguidance's tokenizer. Called by ``constrain``, once per model.
"""

import re
from types import ModuleType
from typing import Any

from mlx_optiq_ext.engine.token_bytes import added_tokens, token_bytes
from mlx_optiq_ext.errors import RequestError, UsageError

__all__ = ["grammar_tokenizer", "llguidance", "markers_of"]

_WORD = re.compile(r"\w+")


def llguidance() -> ModuleType:
    """The library that constrains decoding.

    Raises:
        UsageError: It is not installed.
    """
    try:
        # Part of the extra "serve": everything else of the engine works without it.
        import llguidance as library
    except ImportError as error:
        raise UsageError(
            "constrained decoding (tool_choice, structured output) needs llguidance: "
            'install it with pip install "mlx-optiq-ext[serve]"'
        ) from error
    return library  # type: ignore[no-any-return]


def markers_of(tokenizer: Any) -> dict[str, int]:
    """Tokens that delimit and are never a part of what is said, by their text.

    These are the special tokens, and added ones that the chat template or the family's tool and reasoning
    syntax names: some families do not declare their markers special.
    """
    named = [getattr(tokenizer, "chat_template", None), tokenizer.tool_call_start, tokenizer.tool_call_end]
    named += [tokenizer.think_start, tokenizer.think_end, *tokenizer.structural_markers]
    text = "\n".join(each for each in named if isinstance(each, str))
    special = set(tokenizer.all_special_ids)
    return {
        marker: token
        for marker, token in added_tokens(tokenizer).items()
        if token in special or (marker.strip() and not _WORD.fullmatch(marker) and marker in text)
    }


def grammar_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer; markers can only be drawn where a grammar names them.

    Args:
        tokenizer: mlx-lm's wrapper.
        vocab_size: Width of the logits.
    Raises:
        UsageError: llguidance is not installed.
        RequestError: The tokenizer has no end of turn, so that no answer could be complete.
    """
    library = llguidance()
    ends = sorted(token for token in tokenizer.eos_token_ids if 0 <= token < vocab_size)
    if not ends:
        raise RequestError("this model has no end-of-turn token: its answers cannot be constrained")
    return library.LLTokenizer(_Vocabulary(tokenizer, vocab_size, ends), eos_token=ends)


class _Vocabulary:
    """What llguidance reads of a tokenizer that is not its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.tokens = token_bytes(tokenizer, range(vocab_size))
        markers = {token for token in markers_of(tokenizer).values() if token < vocab_size}
        self.special_token_ids = sorted(markers | set(ends))

    def __call__(self, text: bytes | str) -> list[int]:
        words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return list(self._tokenizer.encode(words, add_special_tokens=False))
