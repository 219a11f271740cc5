"""SmolLM2-135M-Instruct through the importer: known facts, sane numbers, a chat answer."""

import json
import math
from pathlib import Path

import pytest

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm import generate, load  # noqa: E402
from mlx_lm.models.llama import Model, ModelArgs  # noqa: E402

from mlx_optiq_ext.cli.commands.import_gguf import import_folder  # noqa: E402
from mlx_optiq_ext.models.gguf_import import locate_gguf  # noqa: E402
from mlx_optiq_ext.types.options import ImportGgufOptions  # noqa: E402

pytestmark = pytest.mark.model

PROSE = (
    "Photosynthesis is the process by which green plants, algae, and some bacteria convert light energy into "
    "chemical energy. During photosynthesis, plants absorb carbon dioxide from the air and water from the "
    "soil. Using energy from sunlight, chlorophyll in the leaves converts these raw materials into glucose "
    "and oxygen. The glucose is used by the plant for growth and energy, while the oxygen is released into "
    "the atmosphere."
)


@pytest.fixture(scope="module")
def imported(smollm2_wheel, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "model"
    import_folder(smollm2_wheel, out, ImportGgufOptions(dtype="float32"))
    return out


@pytest.fixture(scope="module")
def loaded(imported):
    return load(str(imported))


def test_config_has_the_known_facts(imported):
    config = json.loads((imported / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_weights_are_the_exact_values_of_the_gguf_file(imported, smollm2_wheel):
    weights = mx.load(str(imported / "model.safetensors"))
    with locate_gguf(smollm2_wheel) as path:
        stored = mx.load(str(path))
        names = {"token_embd": "model.embed_tokens", "blk.7.ffn_down": "model.layers.7.mlp.down_proj"}
        for source, name in names.items():
            scales, biases = (stored[f"{source}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            bits = 8 if source == "token_embd" else 4
            value = mx.dequantize(stored[f"{source}.weight"], scales, biases, group_size=32, bits=bits)
            # mx computes scale*(q) + bias with one more rounding than scale*(q-8).
            assert mx.allclose(weights[f"{name}.weight"], value, rtol=1e-6, atol=1e-6)


def test_rotary_order_matches_interleaved_rotation_of_the_stored_rows(loaded, smollm2_wheel):
    """GGUF rows with interleaved rotary embeddings and our rows with halves must be the same function."""
    model, tokenizer = loaded
    tokens = mx.array([tokenizer.encode("The quick brown fox jumps over")])
    interleaved = Model(ModelArgs.from_dict({**vars(model.args), "rope_traditional": True}))
    with locate_gguf(smollm2_wheel) as path:
        stored = mx.load(str(path))
        weights = dict(nn.utils.tree_flatten(model.parameters()))
        for block in range(30):
            for part in "qk":
                triplet = [
                    stored[f"blk.{block}.attn_{part}.{leaf}"] for leaf in ("weight", "scales", "biases")
                ]
                triplet[1:] = [array.astype(mx.float32) for array in triplet[1:]]
                value = mx.dequantize(*triplet, group_size=32, bits=4)
                weights[f"model.layers.{block}.self_attn.{part}_proj.weight"] = value
        interleaved.load_weights(list(weights.items()))
        mx.eval(interleaved.parameters())
    ours, theirs = model(tokens), interleaved(tokens)
    # Two orders of the same float32 sums through 30 blocks.
    assert mx.abs(ours - theirs).max().item() < 5e-2
    assert mx.abs(ours).max().item() > 5.0


def test_perplexity_of_english_prose_is_sane(loaded):
    model, tokenizer = loaded
    tokens = mx.array([tokenizer.encode(PROSE)])
    loss = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean").item()
    assert 2.0 < math.exp(loss) < 10.0


def test_chat_template_gives_a_sensible_answer(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    answer = generate(model, tokenizer, prompt, max_tokens=24)
    assert "Paris" in answer
    assert "<|im_end|>" not in answer


@pytest.mark.parametrize(
    "text",
    [
        "In 1984, 12345 + 67.89 = x",
        "def f(a_b):\n\treturn  {'k': [1, 2]}\n\n\n",
        "naïve Ünïcödé 你好 مرحبا 🙂 e\u0301 \u00a0",
        "<|im_start|>user\nhi<|im_end|>\n<repo_name>x",
        "  lead and trail   ",
        "don't I'LL we've",
    ],
)
def test_tokens_round_trip(loaded, text):
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_have_the_known_ids(loaded):
    """Digits one by one, control tokens whole, no BOS in front."""
    tokenizer = loaded[1]
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode("<|im_start|>user\n2024<|im_end|>") == [1, 4093, 198, 34, 32, 34, 36, 2]
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1


def test_folder_holds_what_a_model_folder_holds(imported: Path):
    names = {path.name for path in imported.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optiq_import.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
