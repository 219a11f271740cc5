"""mlx-lm's own commands store their KV cache as ``--kv-config`` says, or refuse in one line."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.formats.kv_config import write_kv_config
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.patches import kv_command
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import Choice

# Coarse enough for other tokens than with the stock cache.
TWO = Choice(bits=2, group_size=32)
COARSE = KVConfig(layers=(KVLayer(index=0, k=TWO, v=TWO), KVLayer(index=1, k=TWO, v=TWO)), rotate=False)
KEPT = KVConfig(layers=(KVLayer(index=0), KVLayer(index=1)))
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Name → path of a configuration."""
    folder = tmp_path_factory.mktemp("kv")
    deep = KVConfig(layers=(KVLayer(index=5, k=TWO),))
    wide = KVConfig(layers=(KVLayer(index=0, k=Choice(bits=4, group_size=64)),))
    for name, config in {"coarse": COARSE, "kept": KEPT, "deep": deep, "wide": wide}.items():
        write_kv_config(folder / f"{name}.json", config)
    (folder / "broken.json").write_text('{"format_version": 1, "layers": [{"index": "x"}]}')
    return folder


@pytest.fixture(scope="module")
def texts(exact_llama, configs):
    """Name of a configuration → what ``generate`` must answer."""
    from mlx_lm import generate, load

    from mlx_optiq_ext.formats.kv_config import read_kv_config
    from mlx_optiq_ext.kv.build import build_caches

    was_hooked = any(isinstance(finder, _hook._Finder) for finder in sys.meta_path)
    mlx_optiq_ext.install()
    model, tokenizer = load(str(exact_llama))
    prompt = tokenizer.encode(PROMPT, add_special_tokens=True)
    made = {"stock": generate(model, tokenizer, prompt, max_tokens=12)}
    for name in ("coarse", "kept"):
        caches = build_caches(model, read_kv_config(configs / f"{name}.json"))
        made[name] = generate(model, tokenizer, prompt, max_tokens=12, prompt_cache=caches)
    if not was_hooked:
        _hook.uninstall()
    assert made["kept"] == made["stock"] != made["coarse"]
    return made


@pytest.fixture
def run(stock_modules, monkeypatch, capsys):
    """``run("chat", words…)`` → (exit code, stdout, stderr, configuration that was in force)."""
    mlx_optiq_ext.install()

    def call(name, *words):
        seen = []
        original = kv_command.KVCommand.caches
        monkeypatch.setattr(
            kv_command.KVCommand,
            "caches",
            lambda self, model, size: seen.append(self.config) or original(self, model, size),
        )
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{name}", *map(str, words)])
        code = 0
        try:
            stock_modules[f"mlx_lm.{name}"].main()
        except SystemExit as ending:
            code = ending.code
        monkeypatch.setattr(kv_command.KVCommand, "caches", original)
        printed = capsys.readouterr()
        assert kv_command.running() is None
        return code, printed.out, printed.err, seen

    return call


def generate_words(model, *more):
    return ["--model", model, "--prompt", PROMPT, "--max-tokens", "12", "--ignore-chat-template", *more]


@pytest.mark.parametrize("spelling", ["script", "package", "module"])
def test_every_spelling_of_generate(hooked, console_script, exact_llama, configs, texts, tmp_path, spelling):
    words = {
        "script": [console_script.with_name("mlx_lm.generate")],
        "package": ["-m", "mlx_lm", "generate"],
        "module": ["-m", "mlx_lm.generate"],
    }[spelling]
    more = ["--kv-config", configs / "coarse.json", "--verbose", "False"]
    done = hooked.run(*words, *generate_words(exact_llama, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert texts["coarse"] in done.stdout
    assert texts["stock"] not in done.stdout


def test_disabled_means_stock(hooked, exact_llama, configs, texts, tmp_path):
    words = ["-m", "mlx_lm", "generate", *generate_words(exact_llama)]
    more = ["--kv-config", configs / "coarse.json"]
    done = hooked.run(*words, *more, cwd=tmp_path, MLX_OPTIQ_DISABLE="1")
    assert done.returncode == 2
    assert "unrecognized arguments: --kv-config" in done.stderr
    assert "mlx-optiq-ext" not in done.stderr


def test_an_unsupported_mlx_lm_is_left_alone_with_one_line(hooked, tmp_path):
    # A package of the same name and a later version stands before the real one.
    package = tmp_path / "mlx_lm"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.99.0'\n")
    for name in ("generate", "chat"):
        (package / f"{name}.py").write_text("def main(): print('stock')\n")
    code = "import mlx_lm.chat, mlx_lm.generate; mlx_lm.chat.main()"
    asked = hooked.run("-c", code, "--kv-config=f", cwd=tmp_path)
    assert asked.stdout == "stock\n"
    assert asked.stderr.count("\n") == 1
    assert "mlx-lm>=0.32,<0.33, found mlx-lm 0.99.0" in asked.stderr
    silent = hooked.run("-c", code, cwd=tmp_path)
    assert (silent.stdout, silent.stderr) == ("stock\n", "")


def test_recent_overrides_the_file(run, exact_llama, configs, texts):
    words = generate_words(exact_llama, "--kv-config", configs / "coarse.json", "--kv-recent", "64")
    code, out, _, seen = run("generate", *words)
    assert code == 0
    assert [config.recent for config in seen] == [64]
    # All tokens are recent, hence exact.
    assert texts["stock"] in out


def test_a_configuration_of_other_weights_runs_and_is_named(run, exact_llama, tmp_path):
    from mlx_optiq_ext.hub.fingerprint import fingerprint
    from mlx_optiq_ext.types.model import ModelRef

    own = fingerprint(ModelRef(path=str(exact_llama), source="own"))
    other = msgspec.structs.replace(own, sha256="0" * 64, source="org/other")
    for made_for, said in ((own, 0), (other, 1)):
        write_kv_config(tmp_path / "kv.json", msgspec.structs.replace(KEPT, model=made_for))
        code, _, err, _ = run("generate", *generate_words(exact_llama, "--kv-config", tmp_path / "kv.json"))
        assert code == 0
        assert err.count("\n") == said, err
    assert err.startswith(
        "mlx_lm.generate: --kv-config was made for other weights (org/other) than those of "
    )


def test_without_the_option_nothing_changes(run, exact_llama, texts):
    code, out, err, seen = run("generate", *generate_words(exact_llama))
    assert (code, err, seen) == (0, "", [])
    assert texts["stock"] in out


def test_chat_keeps_its_cache_in_mixed_precision(run, exact_llama, configs, monkeypatch, stock_modules):
    chat = stock_modules["mlx_lm.chat"]
    held = []
    stock = chat.stream_generate

    def noting(model, tokenizer, prompt, **keywords):
        held.append(keywords["prompt_cache"])
        return stock(model, tokenizer, prompt, **keywords)

    monkeypatch.setattr(chat, "stream_generate", noting)
    said = iter(["hello", "more", "r", "again", "q"])
    monkeypatch.setattr(chat.ChatUI, "prompt", lambda self: next(said))
    words = ["--model", exact_llama, "--max-tokens", "4", "--kv-config", configs / "coarse.json"]
    code, _, err, seen = run("chat", *words)
    assert code == 0, err
    assert seen == [COARSE, COARSE]  # at the start, and after "r"
    assert all(isinstance(cache, MixedKVCache) for caches in held for cache in caches)
    assert held[0] is held[1] is not held[2]


def test_a_prompt_saved_in_mixed_precision_is_gone_on_with(run, exact_llama, configs, texts, tmp_path):
    saved = tmp_path / "prompt.safetensors"
    # The model has a chat template, which adds a line end to what is saved and to what follows.
    words = ["--model", exact_llama, "--prompt", "Once upon", "--prompt-cache-file", saved]
    code, out, err, seen = run("cache_prompt", *words, "--kv-config", configs / "coarse.json")
    assert code == 0, err
    assert "Saving" in out
    assert seen == [COARSE]
    more = ["--prompt-cache-file", saved, "--prompt", " a time", "--max-tokens", "6"]
    code, out, err, _ = run("generate", *more, "--ignore-chat-template", "--verbose", "False")
    assert code == 0, err
    assert out.strip() == _continued(exact_llama, saved)
    code, _, err, _ = run("generate", *more, "--kv-config", configs / "coarse.json")
    assert code == 2
    assert f"--kv-config cannot change how {saved} is stored" in err


def _continued(model_folder, saved):
    from mlx_lm import generate, load
    from mlx_lm.models.cache import load_prompt_cache

    model, tokenizer = load(str(model_folder))
    caches = load_prompt_cache(str(saved))
    assert all(isinstance(cache, MixedKVCache) for cache in caches)
    return generate(model, tokenizer, " a time", max_tokens=6, prompt_cache=caches).strip()


REFUSALS = {
    "missing file": (["--kv-config", "{configs}/none.json"], 2, "cannot read KV configuration"),
    "broken file": (["--kv-config", "{configs}/broken.json"], 2, r"`$.layers[0].index`"),
    "recent alone": (["--kv-recent", "4"], 2, "--kv-recent needs --kv-config"),
    "negative recent": (["--kv-config", "{configs}/kept.json", "--kv-recent", "-1"], 2, "--kv-recent is -1"),
    "other model": (["--kv-config", "{configs}/deep.json"], 3, "names caches 5, where this model"),
    "group that does not divide": (
        ["--kv-config", "{configs}/wide.json"],
        2,
        "which group 64 does not divide",
    ),
}


@pytest.mark.parametrize("name", ["generate", "chat", "cache_prompt", "server"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_work_is_one_line_before_weights_are_read(
    run, exact_llama, configs, stock_modules, monkeypatch, name, refusal
):
    for module in ("generate", "chat", "cache_prompt", "server"):
        monkeypatch.setattr(stock_modules[f"mlx_lm.{module}"], "load", None)  # calling it would raise
    more, expected, message = REFUSALS[refusal]
    words = [word.format(configs=configs) for word in more]
    if name == "cache_prompt":
        words += ["--prompt-cache-file", "unused", "--prompt", "p"]
    code, _, err, _ = run(name, "--model", exact_llama, *words)
    assert code == expected
    (line,) = err.splitlines()
    assert line.startswith(f"mlx_lm.{name}: error: ")
    assert message in line


@pytest.mark.parametrize("name", ["generate", "server"])
def test_two_ways_of_storing_are_refused(run, exact_llama, configs, name):
    words = ["--model", exact_llama, "--kv-config", configs / "kept.json", "--kv-bits", "4"]
    code, _, err, _ = run(name, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "--kv-config and --kv-bits both say" in err


def test_help_lists_the_options_of_every_command(run):
    for name in ("generate", "chat", "cache_prompt", "server"):
        code, out, _, _ = run(name, "--help")
        assert code == 0
        assert "--kv-config FILE" in out
        assert "--kv-recent N" in out


@contextlib.contextmanager
def serving(environment, folder, *words):
    """A server on a free port of this machine; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(environment.python), "-m", "mlx_lm", "server", "--port", str(port), *map(str, words)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment.variables(), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _await(process, f"{address}/health", folder / "server.log")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def _await(process, url, log):
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def ask(address, prompt):
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0.0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]


@pytest.mark.parametrize("name", ["kept", "coarse"])
def test_the_server_batches_requests_in_mixed_precision(hooked, exact_llama, configs, texts, tmp_path, name):
    prompts = [PROMPT, PROMPT, "It was a dark and stormy night"]
    words = ["--model", exact_llama, "--kv-config", configs / f"{name}.json", "--log-level", "DEBUG"]
    with serving(hooked, tmp_path, *words) as address:
        gate = threading.Barrier(len(prompts))

        def together(prompt):
            gate.wait(timeout=30)
            return ask(address, prompt)

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(together, prompts))
    assert answers[:2] == [texts[name], texts[name]]
