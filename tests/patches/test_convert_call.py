"""A stock call with the "optiq" recipe becomes the right conversion, or a clear refusal before any work."""

import inspect
import io
from pathlib import Path

import pytest

import mlx_optiq_ext
from mlx_optiq_ext.errors import OutputExists, UsageError
from mlx_optiq_ext.formats.arguments import option_names
from mlx_optiq_ext.patches import convert_call as seam
from mlx_optiq_ext.progress_line import ProgressLine
from mlx_optiq_ext.types.options import ConvertOptions
from mlx_optiq_ext.types.progress import Progress


@pytest.fixture
def calls(convert_module, monkeypatch):
    """Every conversion that would have been run."""
    seen = []
    monkeypatch.setattr(seam, "run_call", seen.append)
    mlx_optiq_ext.install()
    return seen


@pytest.fixture
def convert(convert_module, calls, tmp_path, monkeypatch):
    """``mlx_lm.convert("m", quant_predicate="optiq", ...)`` → the conversion it asks for."""
    monkeypatch.chdir(tmp_path)

    def call(**keywords):
        convert_module.convert("m", quant_predicate="optiq", **keywords)
        return calls.pop()

    return call


def test_defaults(convert):
    call = convert()
    assert (call.source, call.out) == ("m", "mlx_model")
    assert call.options.allocate.target_bpw == 5.0
    default = ConvertOptions()
    assert call.options.measure == default.measure
    assert (call.options.dtype, call.options.upload_repo) == ("auto", None)


def test_stock_arguments_find_their_options(convert):
    call = convert(
        mlx_path=Path("out"),
        quantize=True,
        q_group_size=32,
        dtype="float16",
        upload_repo="me/it",
        revision="main",
        trust_remote_code=True,
    )
    assert call.out == "out"
    assert call.options.measure.candidate_groups == "32"
    assert call.options.measure.revision == "main"
    assert call.options.measure.trust_remote_code is True
    assert (call.options.dtype, call.options.upload_repo) == ("float16", "me/it")


@pytest.mark.parametrize(("bits", "group", "bpw"), [(4, None, 4.5), (4, 32, 5.0), (6, 128, 6.25)])
def test_q_bits_asks_for_the_size_of_that_uniform_model(convert, bits, group, bpw):
    assert convert(q_bits=bits, q_group_size=group).options.allocate.target_bpw == bpw


def test_own_keywords_reach_both_nested_structs(convert):
    call = convert(optiq_target_bpw=4.5, optiq_method="kl", optiq_pin=["a=4", "b=8"], optiq_score=False)
    assert call.options.allocate.target_bpw == 4.5
    assert call.options.allocate.pin == ("a=4", "b=8")
    assert call.options.measure.method == "kl"
    assert call.options.score is False


def test_a_bit_map_replaces_the_default_target(convert):
    options = convert(optiq_sensitivity="table.json", optiq_allocation="map.json").options
    assert options.allocation == "map.json"
    assert options.allocate.target_bpw is None


def test_another_kind_of_target_replaces_the_default(convert):
    allocate = convert(optiq_target_size="900MB").options.allocate
    assert (allocate.target_bpw, allocate.target_size) == (None, "900MB")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dequantize": True}, "--dequantize and --quant-predicate optiq contradict"),
        ({"q_mode": "mxfp4"}, r"--optiq-candidate-bits 4,6,8,mxfp4"),
        ({"q_bits": 4, "optiq_fit": "8GB"}, "--q-bits 4 and --optiq-fit both set the target"),
        ({"q_bits": 7}, "is not a choice"),
        ({"dtype": "float16", "optiq_dtype": "float32"}, "--dtype float16 and --optiq-dtype float32 differ"),
        (
            {"q_group_size": 32, "optiq_candidate_groups": "64"},
            "--q-group-size 32 and --optiq-candidate-groups 64",
        ),
        ({"optiq_target_bpw": 0.5}, r"--optiq-target-bpw: 0\.5 will not do"),
        ({"optiq_method": "guess"}, "--optiq-method: 'guess'"),
    ],
)
def test_what_makes_no_sense_is_refused(convert, keywords, message):
    with pytest.raises(UsageError, match=message):
        convert(**keywords)


def test_an_existing_output_is_refused_first(convert, tmp_path):
    with pytest.raises(OutputExists, match="exists already"):
        convert(mlx_path=str(tmp_path), dequantize=True)


def test_an_unknown_keyword_is_a_type_error(convert):
    with pytest.raises(TypeError, match="unexpected keyword argument 'optiq_target'"):
        convert(optiq_target=5)


def test_every_option_is_a_flag_of_the_stock_parser(convert_module, calls):
    words = ["--model", "m", "--quant-predicate", "optiq", "--optiq-fit", "8GB", "--no-optiq-verify"]
    parser = convert_module.configure_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {f"--optiq-{name.replace('_', '-')}" for name in option_names(ConvertOptions)} <= flags
    convert_module.convert(**vars(parser.parse_args(words)))
    (call,) = calls
    assert call.options.verify is False
    assert (call.options.allocate.target_bpw, call.options.allocate.fit) == (None, "8GB")


def test_other_predicates_reach_the_stock_function_unchanged(convert_module, monkeypatch):
    seen = []

    def stock(*args, **kwargs):
        seen.append((args, kwargs))
        return "stock"

    stock.__signature__ = inspect.signature(convert_module.convert)
    monkeypatch.setattr(convert_module, "convert", stock)
    mlx_optiq_ext.install()
    predicate = lambda path, module: True  # noqa: E731
    for keywords in ({}, {"quant_predicate": "mixed_4_6"}, {"quant_predicate": predicate, "nonsense": 1}):
        assert convert_module.convert("m", "out", **keywords) == "stock"
        assert seen.pop() == (("m", "out"), keywords)


def test_our_keyword_without_our_recipe_is_refused(convert_module, calls):
    with pytest.raises(UsageError, match="--optiq-target-bpw needs --quant-predicate optiq"):
        convert_module.convert("m", quant_predicate="mixed_4_6", optiq_target_bpw=4.0)


def test_positional_arguments_are_understood(convert_module, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert_module.convert("m", "out", True, None, None, "affine", None, None, None, False, "optiq")
    assert calls[0].out == "out"


def test_the_command_ends_with_one_line_and_our_exit_code(
    convert_module, calls, tmp_path, monkeypatch, capsys
):
    words = ["mlx_lm.convert", "--hf-path", "m", "--mlx-path", str(tmp_path), "--quant-predicate", "optiq"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ending:
        convert_module.main()
    assert ending.value.code == OutputExists.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_progress_off_a_terminal_is_a_line_per_stage_and_its_end():
    stream = io.StringIO()
    with ProgressLine(stream, prefix="[optiq] ") as sink:
        for stage in ("measure", "write"):
            for done in range(101):
                sink(Progress(stage=stage, done=done, total=100))
    lines = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["[optiq]", stage] for stage in ("measure", "measure", "write", "write")
    ]
    assert [line.split()[3] for line in lines] == ["0/100", "100/100"] * 2
