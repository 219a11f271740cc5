"""A wheel of this checkout, environments with and without it, and a tiny random model."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_optiq_ext import _hook

ROOT = Path(__file__).parents[2]
OUR_VARIABLES = ("MLX_OPTIQ_DISABLE", "MLX_OPTIQ_STRICT", "PYTHONPATH", "PYTHONHOME")


class Environment:
    """A virtual environment with our wheel or without."""

    def __init__(self, folder: Path, wheel: Path | None = None) -> None:
        venv.create(folder, with_pip=wheel is not None, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = (
            folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        )
        if wheel is not None:
            words: Sequence[str | Path] = (
                "-m",
                "pip",
                "install",
                "--no-deps",
                "--no-index",
                "--quiet",
                wheel,
            )
            done = self.run(*words, cwd=folder)
            assert done.returncode == 0, done.stderr

    def with_outer_packages(self) -> "Environment":
        """Let it see the packages of the running interpreter, but not their start-up files."""
        outer = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
        (self.site / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
        return self

    def variables(self) -> dict[str, str]:
        """What its processes find in their environment."""
        env = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
        return env | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python with these arguments."""
        command = [str(self.python), *map(str, words)]
        env = self.variables() | variables
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without our package: stock mlx-lm."""
    return Environment(tmp_path_factory.mktemp("bare")).with_outer_packages()


@pytest.fixture(scope="session")
def hooked(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """After a plain ``pip install`` of our wheel."""
    return Environment(tmp_path_factory.mktemp("hooked"), wheel).with_outer_packages()


@pytest.fixture
def fresh(tmp_path: Path, wheel: Path) -> Environment:
    """Our wheel and nothing else, for one test to spoil."""
    return Environment(tmp_path / "fresh", wheel)


@pytest.fixture(scope="session")
def console_script() -> Path:
    """mlx-lm's own ``mlx_lm.convert``, as pip wrote it."""
    found = shutil.which("mlx_lm.convert", path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip("mlx-lm's console scripts are not installed beside this Python")
    return Path(found)


@pytest.fixture
def stock_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Every module that we extend, stock, whatever the start-up file of the test environment did."""
    for variable in OUR_VARIABLES[:2]:
        monkeypatch.delenv(variable, raising=False)
    was_hooked = any(isinstance(finder, _hook._Finder) for finder in sys.meta_path)
    modules = {name: importlib.import_module(name) for name in sorted(_hook.SEAMS)}
    _hook.uninstall()
    yield modules
    _hook.uninstall()
    # What the test replaced has to be back before the start-up state returns.
    monkeypatch.undo()
    if was_hooked:
        _hook.install()


@pytest.fixture
def convert_module(stock_modules: dict[str, ModuleType]) -> ModuleType:
    """Stock ``mlx_lm.convert``."""
    return stock_modules["mlx_lm.convert"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with a byte tokenizer, as a Hugging Face folder."""
    return write_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def exact_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, with heads that a group divides, and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "exact-llama"
    # Float32: a batch and a single row give the same tokens, whatever kernels they run on.
    write_llama(folder, 4.0, head_dim=32, torch_dtype="float32", vocab_size=257, tie_word_embeddings=False)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    return folder


def write_llama(folder: Path, spread: float = 1.0, **changes: Any) -> Path:
    """Write a random two-block Llama with these changes of its config.

    Its matrices are multiplied by ``spread``: with more than 1 what it attends to decides the next token.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    vocabulary = {
        token: index for index, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "eos_token_id": 0,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    dtype = getattr(mx, config["torch_dtype"])
    cast = {
        name: (weight * (spread if weight.ndim == 2 else 1.0)).astype(dtype)
        for name, weight in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), cast, metadata={"format": "pt"})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder
