"""Rebuild Hugging Face tokenizer files from the tokenizer metadata of a GGUF file.

Makes the content of tokenizer.json, tokenizer_config.json and special_tokens_map.json as plain data; writes
nothing and knows nothing of weights. Byte-level BPE is rebuilt as it is; SentencePiece vocabularies go
through ``gguf_sentencepiece``. Called by the importer.

Source: GGUF specification (tokenizer.ggml.* keys); public tokenizer.json files of the families for the
split patterns.
"""

from typing import Any

import msgspec

from mlx_optiq_ext.errors import UnsupportedModel, UsageError
from mlx_optiq_ext.models.gguf_file import GgufFile
from mlx_optiq_ext.models.gguf_sentencepiece import sentencepiece_parts

__all__ = ["SpecialTokens", "TokenizerFiles", "rebuild_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4
_UNKNOWN = 2


class SpecialTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of the tokens with a role; None where the file names none."""

    bos: int | None = None
    eos: int | None = None
    end_of_turn: int | None = None
    pad: int | None = None
    unknown: int | None = None


class TokenizerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of the three tokenizer files, and the special ids config.json needs."""

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, str]
    special: SpecialTokens


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPLIT_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "codeshell", "command-r"})
_PLAIN = frozenset({"gpt-2", "olmo", "phi-2", "default"})
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "tekken"})


def rebuild_tokenizer(file: GgufFile) -> TokenizerFiles:
    """Turn the tokenizer metadata of a GGUF file into Hugging Face files.

    Args:
        file: The parsed file.
    Returns:
        File contents as plain data.
    Raises:
        UnsupportedModel: A vocabulary type or a split rule that is not known here.
        UsageError: The vocabulary is missing or damaged.
    """
    model = file.text("tokenizer.ggml.model")
    _check_vocabulary(file)
    special = _special_tokens(file)
    if model == "gpt2":
        parts = _byte_level_parts(file)
    elif model == "llama":
        parts = sentencepiece_parts(file, special.unknown)
    else:
        raise UnsupportedModel(
            f"{file.path.name}: tokenizer type {model!r} cannot be rebuilt (gpt2 = byte-level BPE and llama ="
            " SentencePiece can); take the model's original folder"
        )
    added = _added_tokens(file)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _post_processor(file, special, parts["post_processor"]),
    }
    tokenizer_config, special_map = _configs(file, special, added)
    return TokenizerFiles(
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        special_tokens_map=special_map,
        special=special,
    )


def _check_vocabulary(file: GgufFile) -> None:
    """Make sure that tokens, their types and the merges belong together."""
    tokens, merges = file.texts("tokenizer.ggml.tokens"), file.texts("tokenizer.ggml.merges")
    kinds = file.numbers("tokenizer.ggml.token_type")
    known = set(tokens)
    if not tokens or len(known) != len(tokens):
        raise UsageError(
            f"{file.path.name}: {len(tokens)} tokens, {len(known)} different; the file is damaged"
        )
    if kinds is not None and len(kinds) != len(tokens):
        raise UsageError(
            f"{file.path.name}: {len(kinds)} token types for {len(tokens)} tokens; the file is damaged"
        )
    for merge in merges:
        left, right = _split_merge(merge)
        if not (left in known and right in known and left + right in known):
            raise UsageError(f"{file.path.name}: merge {merge!r} joins unknown tokens; the file is damaged")


def _special_tokens(file: GgufFile) -> SpecialTokens:
    """Read the ids of tokens with a role."""
    num_tokens = len(file.texts("tokenizer.ggml.tokens"))

    def token_id(role: str) -> int | None:
        value = file.integer(f"tokenizer.ggml.{role}_token_id", -1)
        return value if 0 <= value < num_tokens else None

    return SpecialTokens(
        bos=token_id("bos"),
        eos=token_id("eos"),
        end_of_turn=token_id("eot"),
        pad=token_id("padding"),
        unknown=token_id("unknown"),
    )


def _byte_level_parts(file: GgufFile) -> dict[str, Any]:
    """Normalizer, splitter, model and decoder of a byte-level BPE tokenizer."""
    rule = file.text("tokenizer.ggml.pre", "default")
    rule = _ALIASES.get(rule, rule)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if rule in _SINGLE_DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        splitter: dict[str, Any] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    elif rule in _SPLIT_PATTERNS:
        pattern = {"Regex": _SPLIT_PATTERNS[rule]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        splitter = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    elif rule in _PLAIN:
        splitter = byte_level
    else:
        known = ", ".join(sorted({*_SINGLE_DIGITS, *_SPLIT_PATTERNS, *_ALIASES, *_PLAIN}))
        raise UnsupportedModel(
            f"{file.path.name}: split rule {rule!r} of its tokenizer is not known here; known: {known}. Take"
            " the model's original folder"
        )
    tokens, merges = file.texts("tokenizer.ggml.tokens"), file.texts("tokenizer.ggml.merges")
    return {
        "normalizer": {"type": "NFC"} if rule == "qwen2" else None,
        "pre_tokenizer": splitter,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule in _WHOLE_WORDS_FIRST,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(_split_merge(merge)) for merge in merges],
        },
    }


def _split_merge(merge: str) -> tuple[str, str]:
    """The two halves of a merge line; byte-level tokens never hold a plain space."""
    left, _, right = merge.partition(" ")
    return left, right


def _added_tokens(file: GgufFile) -> list[dict[str, Any]]:
    """Tokens that are matched whole before the text is split."""
    kinds = file.numbers("tokenizer.ggml.token_type")
    if kinds is None:
        return []
    tokens = file.texts("tokenizer.ggml.tokens")
    is_sentencepiece = file.text("tokenizer.ggml.model") == "llama"
    whole = {_CONTROL, _USER_DEFINED} | ({_UNKNOWN} if is_sentencepiece else set())
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, kind in enumerate(kinds.tolist())
        if kind in whole
    ]


def _post_processor(
    file: GgufFile, special: SpecialTokens, plain: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Add BOS and EOS where the file asks for it, around what the vocabulary type needs."""
    tokens = file.texts("tokenizer.ggml.tokens")
    is_sentencepiece = file.text("tokenizer.ggml.model") == "llama"
    bos = special.bos if file.flag("tokenizer.ggml.add_bos_token", is_sentencepiece) else None
    eos = special.eos if file.flag("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return plain

    def wrapped(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [] if bos is None else [{"SpecialToken": {"id": tokens[bos], "type_id": type_id}}]
        after = [] if eos is None else [{"SpecialToken": {"id": tokens[eos], "type_id": type_id}}]
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    named = {
        tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (bos, eos) if i is not None
    }
    template = {
        "type": "TemplateProcessing",
        "single": wrapped("A", 0),
        "pair": wrapped("A", 0) + wrapped("B", 1),
        "special_tokens": named,
    }
    return template if plain is None else {"type": "Sequence", "processors": [plain, template]}


def _configs(
    file: GgufFile, special: SpecialTokens, added: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """tokenizer_config.json and special_tokens_map.json."""
    tokens = file.texts("tokenizer.ggml.tokens")
    roles = {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unknown,
    }
    special_map = {role: tokens[index] for role, index in roles.items() if index is not None}
    special_map.setdefault("pad_token", special_map.get("eos_token", ""))
    special_map = {role: token for role, token in special_map.items() if token}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.integer(f"{file.text('general.architecture')}.context_length"),
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added
        },
        **special_map,
    }
    template = file.metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if isinstance(template, str) else {}), special_map
