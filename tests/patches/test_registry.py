"""Patches are applied whole or not at all, once, and undone to the identical objects."""

import importlib
import sys
import types

import pytest

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.errors import PatchConflict, PatchUnsupported
from mlx_optiq_ext.patches import registry

NAMES = ("convert", "configure_parser", "main", "QUANT_RECIPES")


def report_of(name="convert-recipe"):
    """What the doctor would show of one patch."""
    (found,) = [report for report in registry.report() if report.name == name]
    return found


def states():
    return {report.state for report in registry.report()}


def snapshot(module):
    """The objects behind every name we may touch, and what the list holds."""
    objects = {name: id(getattr(module, name)) for name in NAMES}
    return objects, list(module.QUANT_RECIPES), id(sys.modules["mlx_lm"].convert), list(sys.meta_path)


def test_the_hook_waits_for_exactly_the_patched_modules():
    assert {patch.target for patch in registry.PATCHES} == _hook.SEAMS


def test_apply_then_revert_gives_back_the_identical_objects(convert_module):
    before = snapshot(convert_module)
    mlx_optiq_ext.install()
    assert convert_module.QUANT_RECIPES[-1] == "optiq"
    assert sys.modules["mlx_lm"].convert is convert_module.convert
    assert snapshot(convert_module)[0]["convert"] != before[0]["convert"]
    _hook.uninstall()
    assert snapshot(convert_module) == before


def test_the_effect_is_reported(convert_module):
    assert states() == {"inactive"}
    mlx_optiq_ext.install()
    assert states() == {"active"}
    report = report_of()
    assert (report.state, report.detail, report.target) == ("active", "", "mlx_lm.convert")
    assert report.range == "mlx-lm>=0.32,<0.33"


def test_a_patch_without_effect_is_not_called_active(convert_module, monkeypatch):
    mlx_optiq_ext.install()
    monkeypatch.setattr(convert_module, "QUANT_RECIPES", ["mixed_4_6"])
    monkeypatch.setattr(convert_module, "configure_parser", convert_module.configure_parser.__wrapped__)
    report = report_of()
    assert report.state == "without effect"
    assert "the parser refuses" in report.detail
    monkeypatch.undo()


def test_applying_twice_changes_nothing_more(convert_module):
    mlx_optiq_ext.install()
    once = snapshot(convert_module)
    mlx_optiq_ext.install()
    registry.apply_to("mlx_lm.convert")
    assert snapshot(convert_module) == once
    assert convert_module.QUANT_RECIPES.count("optiq") == 1


def test_names_bound_elsewhere_in_mlx_lm_follow_both_ways(convert_module, monkeypatch):
    early, late = types.ModuleType("mlx_lm.early"), types.ModuleType("mlx_lm.late")
    outsider = types.ModuleType("outsider")
    original = early.convert = outsider.convert = convert_module.convert
    for module in (early, late, outsider):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    mlx_optiq_ext.install()
    late.convert = convert_module.convert  # imported after the patch
    assert early.convert is convert_module.convert is not original
    assert outsider.convert is original
    _hook.uninstall()
    assert early.convert is late.convert is convert_module.convert is original


def test_a_reload_is_patched_afresh(convert_module):
    mlx_optiq_ext.install()
    importlib.reload(convert_module)
    assert convert_module.QUANT_RECIPES.count("optiq") == 1
    assert registry.is_active("mlx_lm.convert")
    assert sys.modules["mlx_lm"].convert is convert_module.convert
    _hook.uninstall()
    assert not hasattr(sys.modules["mlx_lm"].convert, "__wrapped__")
    assert "optiq" not in convert_module.QUANT_RECIPES


def test_someone_elses_later_change_is_not_overwritten(convert_module, monkeypatch):
    mlx_optiq_ext.install()
    ours = convert_module.convert
    theirs = lambda *args, **kwargs: ours(*args, **kwargs)  # noqa: E731
    theirs._mlx_optiq_ext = "wrapped"
    monkeypatch.setattr(convert_module, "convert", theirs)
    with pytest.raises(PatchConflict, match=r"mlx_lm\.convert\.convert was replaced by someone else"):
        registry.revert_all()
    assert convert_module.convert is theirs
    monkeypatch.undo()
    registry.revert_all()
    assert convert_module.convert is ours.__wrapped__


def test_a_recipe_of_that_name_from_someone_else_is_a_conflict(convert_module, monkeypatch):
    monkeypatch.setattr(convert_module, "QUANT_RECIPES", ["mixed_4_6", "optiq"])
    before = snapshot(convert_module)
    with pytest.raises(PatchConflict, match="has 'optiq' already"):
        registry.apply_to("mlx_lm.convert")
    assert snapshot(convert_module) == before


def remove_parameter(module, monkeypatch):
    monkeypatch.setattr(module, "convert", lambda hf_path, mlx_path="x": None)


def freeze_recipes(module, monkeypatch):
    monkeypatch.setattr(module, "QUANT_RECIPES", ("mixed_4_6",))


def drop_main(module, monkeypatch):
    monkeypatch.delattr(module, "main")


def raise_version(module, monkeypatch):
    monkeypatch.setattr(sys.modules["mlx_lm"], "__version__", "0.33.0.dev1")


SEAMS = [
    (remove_parameter, "has no parameter quantize, q_group_size"),
    (freeze_recipes, "QUANT_RECIPES of mlx-lm 0.32.* expected a list, found tuple"),
    (drop_main, "main of mlx-lm 0.32.* no such function"),
    (raise_version, r"mlx-lm>=0\.32,<0\.33, found mlx-lm 0\.33\.0\.dev1"),
]


@pytest.mark.parametrize(("break_seam", "message"), SEAMS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_seam_that_does_not_fit_leaves_mlx_lm_untouched(
    convert_module, monkeypatch, capsys, break_seam, message
):
    break_seam(convert_module, monkeypatch)
    before = dict(vars(convert_module))
    assert not registry.is_active("mlx_lm.convert")
    with pytest.raises(PatchUnsupported, match=message):
        mlx_optiq_ext.install()
    assert dict(vars(convert_module)) == before
    assert report_of().state == "refused"

    # The start-up hook says so where the recipe was asked for, and is silent elsewhere.
    monkeypatch.setattr(sys, "argv", ["mlx_lm.convert", "--quant-predicate=optiq"])
    _hook.install()
    err = capsys.readouterr().err
    assert err.startswith("mlx-optiq-ext: mlx_lm.convert was left as it is: ")
    assert err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["mlx_lm.convert", "--quant-predicate", "mixed_4_6"])
    _hook.install()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MLX_OPTIQ_STRICT", "1")
    with pytest.raises(PatchUnsupported):
        _hook.install()
    assert dict(vars(convert_module)) == before
    monkeypatch.undo()
    mlx_optiq_ext.install()
    assert states() == {"active"}


def test_disable_wins_over_an_explicit_install(convert_module, monkeypatch):
    before = snapshot(convert_module)
    monkeypatch.setenv("MLX_OPTIQ_DISABLE", "1")
    mlx_optiq_ext.install()
    assert snapshot(convert_module) == before


def test_finders_that_ask_the_whole_chain_again_do_not_loop(convert_module, monkeypatch):
    class Curious:
        def find_spec(self, fullname, path=None, target=None):
            if fullname in _hook.SEAMS:
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                        return spec
            return None

    mlx_optiq_ext.install()
    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], Curious(), *sys.meta_path[1:]])
    spec = sys.meta_path[0].find_spec("mlx_lm.convert", sys.modules["mlx_lm"].__path__)
    assert isinstance(spec.loader, _hook._Loader)
    assert not isinstance(spec.loader.inner, _hook._Loader)
    assert spec.loader.get_source("mlx_lm.convert").startswith("#")  # other attributes are the real loader's
    monkeypatch.undo()
