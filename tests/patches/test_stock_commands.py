"""After a plain ``pip install`` every spelling of mlx-lm's convert knows the recipe; stock stays stock."""

import hashlib
import sys
from pathlib import Path

import pytest

SPELLINGS = (
    ("{script}",),
    ("{script_of_all}", "convert"),
    ("-m", "mlx_lm", "convert"),
    ("-m", "mlx_lm.convert"),
    ("-Im", "mlx_lm.convert"),
)


def spell(spelling, console_script):
    scripts = {"script": console_script, "script_of_all": console_script.with_name("mlx_lm")}
    return [word.format(**scripts) for word in spelling]


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("spelling", SPELLINGS, ids=" ".join)
def test_every_spelling_reaches_our_conversion(hooked, console_script, tiny_llama, tmp_path, spelling):
    # The output exists, which our conversion refuses first of all, in its own words.
    words = ["--hf-path", tiny_llama, "--mlx-path", tmp_path, "--quant-predicate", "optiq"]
    done = hooked.run(*spell(spelling, console_script), *words, cwd=tmp_path)
    assert done.returncode == 2
    assert f"mlx_lm.convert: error: {tmp_path} exists already" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_python_call_reaches_our_conversion(hooked, tmp_path):
    code = (
        "import mlx_lm\n"
        "from mlx_optiq_ext.errors import OutputExists\n"
        "try: mlx_lm.convert('m', '.', quant_predicate='optiq', optiq_target_bpw=4.5)\n"
        "except OutputExists: print('ours')\n"
    )
    assert hooked.run("-c", code, cwd=tmp_path).stdout == "ours\n"


def test_help_lists_the_recipe_and_its_options(hooked, tmp_path):
    text = hooked.run("-m", "mlx_lm", "convert", "--help", cwd=tmp_path).stdout
    assert "mixed_4_6,optiq}" in text
    assert "--optiq-target-bpw" in text
    assert "--no-optiq-verify" in text


def test_an_option_out_of_bounds_is_refused_by_its_flag(hooked, tmp_path):
    words = ["--hf-path", "m", "--quant-predicate", "optiq", "--optiq-target-bpw", "0.5"]
    done = hooked.run("-m", "mlx_lm", "convert", *words, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        "error: argument --optiq-target-bpw: '0.5' will not do, it takes a number (above 1, at most 33)"
    )


def test_a_mistake_in_a_stock_option_is_answered_as_ever(hooked, tmp_path):
    done = hooked.run("-m", "mlx_lm", "convert", "--q-bits", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_disable_gives_stock_behaviour(hooked, tmp_path):
    words = ["--hf-path", "m", "--quant-predicate", "optiq"]
    done = hooked.run("-m", "mlx_lm", "convert", *words, cwd=tmp_path, MLX_OPTIQ_DISABLE="1")
    assert done.returncode == 2
    assert "invalid choice: 'optiq'" in done.stderr
    assert "mlx-optiq-ext" not in done.stderr


@pytest.mark.parametrize("module", ["mlx_lm", "mlx_lm.convert"])
def test_a_stock_recipe_is_bit_identical_with_the_hook(bare, hooked, tiny_llama, tmp_path, module):
    words = ["-m", module, *(["convert"] if module == "mlx_lm" else []), "--hf-path", tiny_llama, "-q"]
    words += ["--quant-predicate", "mixed_4_6", "--q-group-size", "64", "--mlx-path"]
    stock = bare.run(*words, tmp_path / "stock", cwd=tmp_path)
    ours = hooked.run(*words, tmp_path / "ours", cwd=tmp_path)
    assert stock.returncode == ours.returncode == 0, stock.stderr + ours.stderr
    # Only the speed in progress bars differs between runs, and that goes to stderr.
    assert ours.stdout == stock.stdout
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "stock")
    assert "model.safetensors" in files_of(tmp_path / "ours")


def test_start_up_adds_two_small_modules_and_nothing_else(bare, hooked, tmp_path):
    code = "import sys; print(*sorted(sys.modules), sep='\\n')"
    before, after = (set(env.run("-c", code, cwd=tmp_path).stdout.split()) for env in (bare, hooked))
    # setuptools, which comes with pip on older Pythons, has a start-up file of its own.
    assert after - before - {"_distutils_hack"} == {"mlx_optiq_ext", "mlx_optiq_ext._hook"}


def test_start_up_cost_is_small(hooked, tmp_path, capsys):
    lines = hooked.run("-X", "importtime", "-c", "", cwd=tmp_path).stderr.splitlines()
    cost_us = sum(int(line.split("|")[0].split(":")[1]) for line in lines if "mlx_optiq_ext" in line)
    with capsys.disabled():
        print(f"\nstart-up cost: {cost_us / 1000:.2f} ms on Python {sys.version.split()[0]}")
    # 0.6 to 0.8 ms on an idle machine; the bound only catches a heavy import.
    assert cost_us < 50_000


def test_importing_mlx_lm_loads_none_of_the_pipeline(hooked, tmp_path):
    code = "import sys, mlx_lm; print(*(m for m in sys.modules if m.startswith('mlx_optiq_ext.')), sep='\\n')"
    loaded = set(hooked.run("-c", code, cwd=tmp_path).stdout.split())
    assert "mlx_optiq_ext.patches.registry" in loaded
    assert not {
        name for name in loaded if name.split(".")[1] in {"quant", "kv", "measure", "models", "hub", "cli"}
    }


def test_an_unsupported_mlx_lm_is_left_alone_with_one_line(hooked, tmp_path):
    # A package of the same name and a later version stands before the real one.
    package = tmp_path / "mlx_lm"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.99.0'\n")
    (package / "convert.py").write_text("import sys\ndef main(): print('stock', *sys.argv[1:])\n")
    code = "from mlx_lm.convert import main; main()"
    asked = hooked.run("-c", code, "--quant-predicate", "optiq", cwd=tmp_path)
    assert asked.stdout == "stock --quant-predicate optiq\n"
    assert asked.stderr.count("\n") == 1
    assert "mlx-lm>=0.32,<0.33, found mlx-lm 0.99.0" in asked.stderr
    silent = hooked.run("-c", code, "--quant-predicate", "mixed_4_6", cwd=tmp_path)
    assert (silent.stdout, silent.stderr) == ("stock --quant-predicate mixed_4_6\n", "")
    strict = hooked.run("-c", code, cwd=tmp_path, MLX_OPTIQ_STRICT="1")
    assert strict.returncode == 1
    assert "PatchUnsupported" in strict.stderr


def test_the_late_door_works_where_start_up_files_are_not_read(bare, wheel, tmp_path):
    # What `pip install --target` leaves: packages on the path, start-up files that site never reads.
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import mlx_lm, mlx_optiq_ext\n"
        "mlx_optiq_ext.install()\n"
        "try: mlx_lm.convert('m', '.', quant_predicate='optiq')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = bare.run("-c", code, cwd=tmp_path)
    assert done.stdout == "OutputExists\n", done.stderr


def test_uninstalling_leaves_nothing(fresh, tmp_path):
    installed = {path.name for path in fresh.site.glob("*mlx_optiq*")}
    assert {"mlx_optiq_ext", "mlx_optiq_ext.pth", "mlx_optiq_ext.start"} <= installed
    done = fresh.run("-m", "pip", "uninstall", "-y", "mlx-optiq-ext", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(fresh.site.glob("*mlx_optiq*")) == []
    assert fresh.run("-c", "", cwd=tmp_path).stderr == ""
