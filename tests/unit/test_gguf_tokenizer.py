"""Tokenizers rebuilt from GGUF metadata split and join text as their families do."""

import json

import gguf
import numpy as np
import pytest
from mlx_lm import load
from support_gguf import random_model, write_gguf
from tokenizers import Tokenizer

from mlx_optiq_ext.cli.commands.import_gguf import import_folder
from mlx_optiq_ext.errors import UnsupportedModel, UsageError
from mlx_optiq_ext.models.gguf_file import read_gguf
from mlx_optiq_ext.models.gguf_import import plan_import
from mlx_optiq_ext.models.gguf_tokenizer import rebuild_tokenizer
from mlx_optiq_ext.types.options import ImportGgufOptions

TEXTS = [
    "hello world, it's 2024!",
    "def f(x):\n\treturn  x\r\n\n",
    "naïve 你好 🙂 e\u0301\u00a0",
    "",
    "  two  spaces  ",
    "<|start|>user<|end|><tool>x",
]


def rebuilt(folder, **options):
    source = write_gguf(folder / "model.gguf", random_model("llama"), "llama", **options)
    return rebuild_tokenizer(read_gguf(source))


def as_tokenizer(files) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(files.tokenizer))


def pieces(tokenizer, text):
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rule", ["smollm", "llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_text_round_trips(tmp_path, rule, text):
    tokenizer = as_tokenizer(rebuilt(tmp_path, pre=rule))
    decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
    # Qwen normalizes to composed characters.
    assert decoded == (text.replace("e\u0301", "é") if rule == "qwen2" else text)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠX", "!!", "Ċ", "Ċ", "y"]),
        ("gpt-2", ["It", "'s", "Ġ1234", "ĠX", "!!", "Ċ", "Ċ", "y"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "ĠX", "!!ĊĊ", "y"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠX", "!!ĊĊ", "y"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠX", "!!ĊĊ", "y"]),
    ],
)
def test_text_is_split_as_the_family_does(tmp_path, rule, expected):
    assert pieces(as_tokenizer(rebuilt(tmp_path, pre=rule)), "It's 1234 X!!\n\ny") == expected


def test_merges_apply_and_special_tokens_stay_whole(tmp_path):
    tokenizer = as_tokenizer(rebuilt(tmp_path))
    assert tokenizer.encode("hello w<|end|><tool>").tokens == ["he", "ll", "o", "Ġw", "<|end|>", "<tool>"]
    assert tokenizer.decode(tokenizer.encode("<|start|>he<tool>").ids) == "he<tool>"


def test_bos_is_added_only_where_the_file_asks(tmp_path):
    assert as_tokenizer(rebuilt(tmp_path)).encode("he").ids == [256]
    assert as_tokenizer(rebuilt(tmp_path, add_bos=True)).encode("he").ids == [259, 256]
    assert as_tokenizer(rebuilt(tmp_path, add_bos=True)).encode("he", "ll").ids == [259, 256, 259, 257]


def test_loaded_tokenizer_has_roles_and_chat_template(tmp_path):
    template = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    source = write_gguf(
        tmp_path / "m.gguf",
        random_model("llama"),
        "llama",
        **{
            "tokenizer.chat_template": template,
            "tokenizer.ggml.eot_token_id": 262,
            "tokenizer.ggml.padding_token_id": 262,
        },
    )
    import_folder(source, tmp_path / "out", ImportGgufOptions())
    _, tokenizer = load(str(tmp_path / "out"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "he"}])
    assert ids == [259, 256, 260]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|start|>",
        "<|end|>",
        "<|pad|>",
    )
    assert tokenizer.eos_token_ids == {260, 262}


def test_unknown_split_rule_names_the_known_ones(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"'brand-new' .* known: .*llama-bpe.*smollm"):
        rebuilt(tmp_path, pre="brand-new")


def write_sentencepiece(folder, *, scores=True, prefix_space=True):
    """A Llama file whose vocabulary is SentencePiece BPE: bytes, letters, and pieces with scores."""
    letters = ["▁", "h", "e", "l", "o", "w", "r", "d"]
    merged = ["he", "ll", "▁w", "hell", "hello", "▁hello", "or", "▁wor", "▁world", "ld"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *merged]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(merged))
    ranks = [0.0] * 259 + [-100.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(merged))]
    path = folder / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores:
        writer.add_token_scores(ranks)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix_space)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_vocabulary_is_rebuilt_with_merges_and_bytes(tmp_path):
    tokenizer = as_tokenizer(rebuild_tokenizer(read_gguf(write_sentencepiece(tmp_path))))
    encoded = tokenizer.encode("hello world")
    assert encoded.tokens == ["<s>", "▁hello", "▁world"]
    assert tokenizer.decode(encoded.ids) == "hello world"
    for text in ("héllo 你 🙂", "  hello"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + (" " + text)
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]


def test_sentencepiece_without_prefix_space(tmp_path):
    source = write_sentencepiece(tmp_path, prefix_space=False)
    tokenizer = as_tokenizer(rebuild_tokenizer(read_gguf(source)))
    assert tokenizer.encode("hello").tokens == ["<s>", "hello"]
    assert tokenizer.decode(tokenizer.encode("hello hello").ids) == "hello hello"


def test_sentencepiece_without_scores_is_refused(tmp_path):
    with pytest.raises(UsageError, match="without matching scores"):
        rebuild_tokenizer(read_gguf(write_sentencepiece(tmp_path, scores=False)))


def test_unknown_vocabulary_type_is_refused(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", random_model("llama"), "llama")
    data = source.read_bytes()
    source.write_bytes(
        data.replace(b"\x04\x00\x00\x00\x00\x00\x00\x00gpt2", b"\x04\x00\x00\x00\x00\x00\x00\x00bert")
    )
    with pytest.raises(UnsupportedModel, match="tokenizer type 'bert'"):
        plan_import(source)
