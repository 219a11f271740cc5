"""mlx-lm makes, saves and opens our caches where it makes its own, and is itself again afterwards."""

import argparse
import inspect
import types

import mlx.core as mx
import msgspec
import pytest

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.errors import FingerprintMismatch, PatchConflict, UsageError
from mlx_optiq_ext.formats.kv_config import write_kv_config
from mlx_optiq_ext.kv.batch import BatchMixedKVCache
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.patches import kv_command, registry
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import Choice

EIGHT, FOUR = Choice(bits=8, group_size=32), Choice(bits=4, group_size=32)
CONFIG = KVConfig(layers=(KVLayer(index=0, k=EIGHT, v=FOUR), KVLayer(index=1, k=FOUR)), recent=4)
PROMPT = mx.array([5, 80, 31, 7, 99, 12, 200, 45, 3, 61])
COMMANDS = ("generate", "chat", "cache_prompt", "server")


@pytest.fixture
def cache_module(stock_modules):
    mlx_optiq_ext.install()
    return stock_modules["mlx_lm.models.cache"]


@pytest.fixture(scope="module")
def model(exact_llama):
    from mlx_lm import load

    return load(str(exact_llama))[0]


def tokens(model, cache, prompt=PROMPT, count=8):
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=count, prompt_cache=cache)]


def without_make_cache():
    """A random model whose caches slide when they are told to: ``max_kv_size`` reaches it."""
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(1)
    return Model(
        ModelArgs(
            model_type="qwen2",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-6,
            vocab_size=257,
        )
    )


def test_every_seam_is_changed_and_restored_to_the_identical_objects(stock_modules):
    provider = stock_modules["mlx_lm.server"].ModelProvider
    before = {name: dict(vars(module)) for name, module in stock_modules.items()}
    load = vars(provider)["_load"]
    mlx_optiq_ext.install()
    for name, names in before.items():
        changed = [key for key, value in vars(stock_modules[name]).items() if names.get(key) is not value]
        assert changed, name
    assert vars(provider)["_load"] is not load
    _hook.uninstall()
    for name, names in before.items():
        now = vars(stock_modules[name])
        assert now.keys() == names.keys()
        assert [key for key, value in now.items() if value is not names[key]] == []
    assert vars(provider)["_load"] is load


def test_every_name_of_the_function_follows(cache_module, stock_modules):
    ours = cache_module.make_prompt_cache
    for name in COMMANDS:
        assert stock_modules[f"mlx_lm.{name}"].make_prompt_cache is ours
    assert list(inspect.signature(ours).parameters) == ["model", "max_kv_size", "kv_config"]


def test_without_a_configuration_the_stock_function_answers(cache_module, model):
    caches = cache_module.make_prompt_cache(model)
    assert [type(cache) for cache in caches] == [cache_module.KVCache] * 2
    (sliding, _) = cache_module.make_prompt_cache(without_make_cache(), 16)
    assert (type(sliding), sliding.max_size) == (cache_module.RotatingKVCache, 16)


def test_a_configuration_may_be_a_value_a_path_or_content(cache_module, model, tmp_path):
    path = tmp_path / "kv_config.json"
    write_kv_config(path, CONFIG)
    content = {"format_version": 1, "layers": [{"index": 0, "k": {"bits": 8, "group_size": 32}}]}
    published = [{"layer_idx": 0, "bits": 8, "group_size": 32}]
    for given in (CONFIG, path, str(path), str(tmp_path), content, published):
        first, second = cache_module.make_prompt_cache(model, kv_config=given)
        assert isinstance(first, MixedKVCache)
        assert isinstance(second, MixedKVCache)
        assert first.layout.key.choice == EIGHT
    assert cache_module.make_prompt_cache(without_make_cache(), 16, CONFIG)[0].layout.window == 16
    with pytest.raises(UsageError, match="kv_config is a int"):
        cache_module.make_prompt_cache(model, kv_config=4)
    with pytest.raises(FingerprintMismatch, match="names caches 7, where this model"):
        cache_module.make_prompt_cache(model, kv_config=KVConfig(layers=(KVLayer(index=7),)))


def test_the_server_s_prompt_cache_hands_out_copies_that_are_rewound(cache_module, model):
    config = msgspec.structs.replace(CONFIG, recent=0)
    first = cache_module.make_prompt_cache(model, kv_config=config)
    model(PROMPT[None], cache=first)
    held = cache_module.LRUPromptCache()
    held.insert_cache("model", PROMPT.tolist(), first)
    wanted = [*PROMPT.tolist()[:6], 77, 78]
    for _ in range(2):  # the second time from the same entry
        reused, rest = held.fetch_nearest_cache("model", wanted)
        assert rest == [77, 78]
        fresh = cache_module.make_prompt_cache(model, kv_config=config)
        model(mx.array(wanted[:6])[None], cache=fresh)
        ours, theirs = (model(mx.array(rest)[None], cache=cache) for cache in (reused, fresh))
        assert mx.allclose(ours, theirs, atol=1e-5)
    assert first[0].offset == len(PROMPT)
    assert held.nbytes == sum(cache.nbytes for cache in first)


def test_caches_of_one_model_are_apart_but_share_their_layout(cache_module, model):
    first = cache_module.make_prompt_cache(model, kv_config=CONFIG)
    tokens(model, first)
    second = cache_module.make_prompt_cache(model, kv_config=CONFIG)
    assert second[0].empty()
    assert second[0].layout is first[0].layout


def test_a_kept_configuration_gives_the_stock_tokens(cache_module, model):
    kept = cache_module.make_prompt_cache(model, kv_config=KVConfig(layers=()))
    assert isinstance(kept[0], MixedKVCache)
    stock = tokens(model, cache_module.make_prompt_cache(model))
    assert tokens(model, kept) == stock
    slider = without_make_cache()
    for size in (6, 12):
        sliding = cache_module.make_prompt_cache(slider, size, KVConfig(layers=()))
        assert tokens(slider, sliding) == tokens(slider, cache_module.make_prompt_cache(slider, size))


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within CacheList"])
def test_a_saved_cache_goes_on_as_before(cache_module, model, tmp_path, wrapped):
    cache = cache_module.make_prompt_cache(model, kv_config=CONFIG)
    tokens(model, cache)
    path = str(tmp_path / "prompt.safetensors")
    saved = [cache_module.CacheList(member) for member in cache] if wrapped else cache
    cache_module.save_prompt_cache(path, saved, {"model": "m"})
    opened, metadata = cache_module.load_prompt_cache(path, return_metadata=True)
    if wrapped:
        opened = [member[0] for member in opened]
    assert metadata == {"model": "m"}
    assert [type(member) for member in opened] == [MixedKVCache] * 2
    assert opened[0].nbytes == cache[0].nbytes
    more = mx.array([17, 90])
    assert tokens(model, opened, more) == tokens(model, cache, more)


def test_a_saved_batch_opens_as_ours(cache_module, model, tmp_path):
    rows = [cache_module.make_prompt_cache(model, kv_config=CONFIG) for _ in range(2)]
    tokens(model, rows[0])
    tokens(model, rows[1], PROMPT[:3])
    batch = [MixedKVCache.merge(list(layer)) for layer in zip(*rows, strict=True)]
    path = str(tmp_path / "batch.safetensors")
    cache_module.save_prompt_cache(path, batch)
    opened = cache_module.load_prompt_cache(path)
    assert [type(member) for member in opened] == [BatchMixedKVCache] * 2
    inputs = mx.array([[4], [5]])
    assert mx.array_equal(model(inputs, cache=opened), model(inputs, cache=batch)).item()


def test_a_batch_generator_makes_and_joins_our_caches(cache_module, model):
    from mlx_lm.generate import BatchGenerator

    prompts = [PROMPT.tolist(), PROMPT[:4].tolist()]
    alone = [
        tokens(model, cache_module.make_prompt_cache(model, kv_config=CONFIG), mx.array(prompt))
        for prompt in prompts
    ]
    with kv_command.command("test") as asked:
        asked.config = CONFIG
        generator = BatchGenerator(model, max_tokens=8)
        uids = generator.insert(prompts)
        found = {uid: [] for uid in uids}
        kinds = set()
        while responses := generator.next_generated():
            kinds |= {type(cache) for cache in generator._generation_batch.prompt_cache}
            for response in responses:
                found[response.uid].append(response.token)
    assert [found[uid] for uid in uids] == alone
    assert BatchMixedKVCache in kinds


def test_what_a_command_asks_for_ends_with_it(cache_module, model):
    with kv_command.command("test") as asked:
        assert isinstance(cache_module.make_prompt_cache(model)[0], cache_module.KVCache)
        asked.config = CONFIG
        assert isinstance(cache_module.make_prompt_cache(model)[0], MixedKVCache)
    assert isinstance(cache_module.make_prompt_cache(model)[0], cache_module.KVCache)


def test_only_a_draft_model_keeps_stock_caches_and_says_so_once(cache_module, model, exact_llama, capsys):
    from mlx_lm import load
    from mlx_lm.generate import speculative_generate_step

    draft = load(str(exact_llama))[0]
    draft.model.layers = draft.model.layers[:1]
    # Without a recent window: what is exact there depends on how many tokens are checked at once.
    config = msgspec.structs.replace(CONFIG, recent=0)
    with kv_command.command("mlx_lm.generate") as asked:
        asked.config = config
        with pytest.raises(FingerprintMismatch):
            cache_module.make_prompt_cache(draft)
        for _ in range(2):
            steps = speculative_generate_step(PROMPT, model, draft, max_tokens=8)
            drafted = [int(token) for token, *_ in steps]
        assert isinstance(cache_module.make_prompt_cache(draft)[0], cache_module.KVCache)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlx_lm.generate: the draft model keeps stock KV caches: ")
    # Where every drafted token is checked with the same caches, drafting changes nothing.
    assert drafted == tokens(model, cache_module.make_prompt_cache(model, kv_config=config))


def provider(stock_modules, model_folder, draft=None):
    """The server's model store, with its model loaded."""
    given = argparse.Namespace(
        model=str(model_folder),
        adapter_path=None,
        draft_model=None if draft is None else str(draft),
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        pipeline=False,
    )
    made = stock_modules["mlx_lm.server"].ModelProvider(given)
    made.load_default()
    return made


def test_the_server_batches_models_with_our_caches(cache_module, stock_modules, exact_llama):
    with kv_command.command("mlx_lm.server") as asked:
        asked.config = CONFIG
        assert provider(stock_modules, exact_llama).is_batchable


def test_the_server_notes_its_draft_model(cache_module, stock_modules, exact_llama, tiny_llama, capsys):
    with kv_command.command("mlx_lm.server") as asked:
        asked.config = CONFIG
        # Heads of 16 numbers, which group 32 does not divide.
        served = provider(stock_modules, exact_llama, tiny_llama)
        assert isinstance(cache_module.make_prompt_cache(served.model)[0], MixedKVCache)
        assert isinstance(cache_module.make_prompt_cache(served.draft_model)[0], cache_module.KVCache)
    assert "mlx_lm.server: the draft model keeps stock KV caches: " in capsys.readouterr().err
    with kv_command.command("mlx_lm.server") as asked:
        asked.config = CONFIG
        with pytest.raises(UsageError, match="which group 32 does not divide"):
            provider(stock_modules, tiny_llama)


def test_a_class_of_that_name_from_someone_else_is_a_conflict(stock_modules, monkeypatch):
    module = stock_modules["mlx_lm.models.cache"]
    monkeypatch.setattr(module, "MixedKVCache", object, raising=False)
    before = dict(vars(module))
    with pytest.raises(PatchConflict, match="has a MixedKVCache already"):
        registry.apply_to("mlx_lm.models.cache")
    assert dict(vars(module)) == before


def test_someone_elses_later_change_of_the_server_is_not_overwritten(stock_modules, monkeypatch):
    mlx_optiq_ext.install()
    server = stock_modules["mlx_lm.server"]
    monkeypatch.setattr(server, "argparse", types.ModuleType("theirs"))
    with pytest.raises(PatchConflict, match=r"mlx_lm\.server\.argparse"):
        registry.revert_all()
    monkeypatch.undo()
    registry.revert_all()


def break_load(modules, monkeypatch):
    monkeypatch.delattr(modules["mlx_lm.server"].ModelProvider, "_load")
    return "kv-server"


def break_parser(modules, monkeypatch):
    monkeypatch.delattr(modules["mlx_lm.chat"], "setup_arg_parser")
    return "kv-chat"


def break_parameters(modules, monkeypatch):
    monkeypatch.setattr(modules["mlx_lm.models.cache"], "make_prompt_cache", lambda model: None)
    return "kv-cache"


@pytest.mark.parametrize("break_seam", [break_load, break_parser, break_parameters])
def test_a_seam_that_does_not_fit_is_refused_alone(stock_modules, monkeypatch, break_seam):
    name = break_seam(stock_modules, monkeypatch)
    with pytest.raises(Exception, match="is not what the patch needs"):
        mlx_optiq_ext.install()
    found = {report.name: report.state for report in registry.report()}
    assert found.pop(name) == "refused"
    assert set(found.values()) == {"active"}


def test_lost_effects_are_noticed(cache_module, stock_modules, monkeypatch):
    ours = cache_module.make_prompt_cache
    monkeypatch.setattr(stock_modules["mlx_lm.chat"], "make_prompt_cache", ours.__wrapped__)
    server = stock_modules["mlx_lm.server"]
    monkeypatch.setattr(server, "argparse", argparse)
    found = {report.name: report for report in registry.report() if report.state == "without effect"}
    assert sorted(found) == ["kv-cache", "kv-server"]
    assert found["kv-cache"].detail.startswith("mlx_lm.chat.make_prompt_cache does not reach our caches")
    assert found["kv-server"].detail == "its --help lacks --kv-config and --kv-recent"
    monkeypatch.undo()
