"""Turn the SentencePiece BPE vocabulary of a GGUF file into the parts of a tokenizer.json.

A GGUF file stores pieces and scores but no merges; a merge is any split of a piece into two pieces, and
its rank follows from the score of the whole. Called by ``gguf_tokenizer`` only.

Source: Kudo & Richardson 2018 (SentencePiece); the tokenizer.json layout of huggingface/tokenizers.
"""

from typing import Any

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.models.gguf_file import GgufFile

__all__ = ["sentencepiece_parts"]

_NORMAL, _USER_DEFINED = 1, 4
_SPACE = "\u2581"


def sentencepiece_parts(file: GgufFile, unknown: int | None) -> dict[str, Any]:
    """Normalizer, splitter, model and decoder of a SentencePiece BPE tokenizer with byte fallback.

    Args:
        file: The parsed file; its tokenizer model is ``llama``.
        unknown: Id of the unknown token.
    Returns:
        Entries of tokenizer.json.
    Raises:
        UsageError: Scores are missing or of another length than the vocabulary.
    """
    tokens = file.texts("tokenizer.ggml.tokens")
    scores = file.numbers("tokenizer.ggml.scores")
    kinds = file.numbers("tokenizer.ggml.token_type")
    if scores is None or kinds is None or not len(tokens) == len(scores) == len(kinds):
        raise UsageError(
            f"{file.path.name}: {len(tokens)} tokens without matching scores and types; file is damaged"
        )
    prefix_space = file.flag("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix_space else []
    restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    mergeable = {
        t for t, kind in zip(tokens, kinds.tolist(), strict=True) if kind in (_NORMAL, _USER_DEFINED)
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(tokens, [float(score) for score in scores.tolist()], mergeable),
        },
    }


def _merges(tokens: list[str], scores: list[float], mergeable: set[str]) -> list[list[str]]:
    """Every split of a piece into two pieces, best score first, then in the order of the halves' ids."""
    index_of = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int]] = []
    for token, score in zip(tokens, scores, strict=True):
        if token not in mergeable:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-score, index_of[left], index_of[right]))
    ranked.sort()
    return [[tokens[left], tokens[right]] for _, left, right in ranked]
