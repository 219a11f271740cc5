"""Sizes and budgets: what is read, and what --fit leaves for weights."""

import pytest
from support_allocation import choices, linear, small_table

from mlx_optiq_ext.allocate.kv_memory import kv_bytes_per_token
from mlx_optiq_ext.allocate.size import budget_from, format_nbytes, head_room_nbytes, parse_nbytes
from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.types.options import AllocateOptions

TABLE = small_table([linear("a", choices("4"), rows=1000, columns=1000)], {"a": {"4": 0.1}})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4.5GB", 4_500_000_000),
        ("900MB", 900_000_000),
        ("4GiB", 4 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("8G", 8_000_000_000),
        ("512kB", 512_000),
        (".5T", 500_000_000_000),
        ("123B", 123),
    ],
)
def test_size_is_read(text, nbytes) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "4.5", "GB", "-1GB", "4 bananas", "1e9B", "4iB", "0GB", "1..2GB"])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(UsageError, match=r"write it like 4\.5GB, 900MB or 4GiB"):
        parse_nbytes(text, flag="--fit")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(4.52e9, "4.52 GB"), (88.44e6, "88.4 MB"), (12_000, "12 kB"), (0, "0 kB")]
)
def test_size_for_people(nbytes, text) -> None:
    assert format_nbytes(nbytes) == text


def test_bits_per_weight_are_exact() -> None:
    assert budget_from(TABLE, AllocateOptions(target_bpw=4.7)).bits == 4_700_000


def test_size_sets_the_header_apart() -> None:
    bits = budget_from(TABLE, AllocateOptions(target_size="1MB")).bits
    assert 8 * 999_000 < bits < 8 * 1_000_000


def test_fit_subtracts_cache_and_head_room() -> None:
    options = AllocateOptions(fit="8GB", context=10_000)
    budget = budget_from(TABLE, options, kv_bytes_per_token=100_000)
    left = 8_000_000_000 - 1_000_000_000 - 800_000_000
    assert 0 <= left - budget.bits // 8 < 2000
    assert "1.00 GB KV cache at 10000 tokens" in budget.origin


def test_head_room_has_a_least() -> None:
    assert head_room_nbytes(1_000_000_000) == 256_000_000
    assert head_room_nbytes(64_000_000_000) == 6_400_000_000


def test_fit_without_room_says_where_it_went() -> None:
    with pytest.raises(BudgetInfeasible, match=r"of 8192 tokens takes 8\.19 GB, head room 800\.0 MB"):
        budget_from(TABLE, AllocateOptions(fit="8GB"), kv_bytes_per_token=1_000_000)


def test_fit_without_cache_size_is_refused() -> None:
    with pytest.raises(UsageError, match="--fit needs the model's config"):
        budget_from(TABLE, AllocateOptions(fit="8GB"))


LLAMA = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        (LLAMA, 30 * 2 * 3 * 64 * 2),
        ({"text_config": LLAMA, "hidden_size": 1}, 30 * 2 * 3 * 64 * 2),
        (LLAMA | {"head_dim": 128}, 30 * 2 * 3 * 128 * 2),
        (LLAMA | {"layer_types": ["linear_attention"] * 20 + ["full_attention"] * 10}, 10 * 2 * 3 * 64 * 2),
        (LLAMA | {"full_attention_interval": 4}, 8 * 2 * 3 * 64 * 2),
        (LLAMA | {"hybrid_override_pattern": "M-M*-" * 6}, 6 * 2 * 3 * 64 * 2),
        (
            LLAMA | {"layer_types": ["sliding_attention"] * 30, "sliding_window": 256},
            30 * 2 * 3 * 64 * 2 // 4,
        ),
        (LLAMA | {"sliding_window_pattern": 6, "sliding_window": 512}, (5 + 25 / 2) * 2 * 3 * 64 * 2),
        (LLAMA | {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 30 * 576 * 2),
    ],
)
def test_cache_per_token_by_family(config, per_token) -> None:
    assert kv_bytes_per_token(config, 1024) == per_token


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": 3}, {"num_attention_heads": 4, "hidden_size": 8}]
)
def test_unknown_cache_is_none(config) -> None:
    assert kv_bytes_per_token(config, 1024) is None
