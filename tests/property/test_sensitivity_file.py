"""Sensitivity files come back as they were written."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.formats.sensitivity import decode_sensitivity, encode_sensitivity
from mlx_optiq_ext.types.quant import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    KEEP,
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Probe,
    SensitivityTable,
    Unit,
)

_NAME = st.text(st.characters(codec="utf-8"), max_size=12)
_NUMBER = st.floats(allow_nan=False, allow_infinity=False)
_CHOICE = st.one_of(
    st.sampled_from([KEEP, Choice.parse("mxfp4"), Choice.parse("nvfp4"), Choice.parse("mxfp8")]),
    st.builds(Choice, bits=st.sampled_from(AFFINE_BITS), group_size=st.sampled_from(AFFINE_GROUPS)),
)
_CALIBRATION = st.builds(
    CalibrationInfo,
    source=_NAME,
    sha256=_NAME,
    num_tokens=st.integers(0, 2**40),
    num_windows=st.integers(0, 2**20),
    domains=st.lists(_NAME, max_size=3).map(tuple),
)
_UNIT = st.builds(
    Unit,
    paths=st.lists(_NAME, min_size=1, max_size=3).map(tuple),
    shape=st.lists(st.integers(1, 2**30), max_size=3).map(tuple),
    numel=st.integers(0, 2**50),
    kind=st.sampled_from(["linear", "embedding", "head", "experts", "multilinear", "router"]),
    block=st.none() | st.integers(0, 200),
    module=_NAME,
    active_share=_NUMBER,
    floor=st.none() | _CHOICE,
    choices=st.lists(_CHOICE, max_size=4).map(tuple),
)
_PROBE = st.builds(
    Probe,
    path=_NAME,
    choice=_CHOICE,
    divergence=_NUMBER,
    stderr=_NUMBER,
    by_domain=st.lists(_NUMBER, max_size=3).map(tuple),
    exact=st.booleans(),
)
_TABLE = st.builds(
    SensitivityTable,
    model=st.builds(ModelFingerprint, model_type=_NAME, sha256=_NAME, source=_NAME, revision=_NAME),
    method=st.sampled_from(["fisher", "kl", "static", "published"]),
    reference=st.sampled_from(["resident", "stream", "none"]),
    correction=st.sampled_from(["none", "fast", "full"]),
    calibration=_CALIBRATION,
    domains=st.lists(_NAME, max_size=3).map(tuple),
    units=st.lists(_UNIT, max_size=4).map(tuple),
    probes=st.lists(_PROBE, max_size=6).map(tuple),
    total_numel=st.integers(0, 2**50),
    fixed_bits=st.integers(0, 2**50),
    float_bits=st.sampled_from([16, 32]),
    notes=st.lists(_NAME, max_size=2).map(tuple),
    forward_equivalents=_NUMBER,
    code_version=_NAME,
)


@settings(max_examples=100)
@given(_TABLE)
def test_round_trip(table: SensitivityTable) -> None:
    data = encode_sensitivity(table)
    assert decode_sensitivity(data, "table") == table
    assert encode_sensitivity(decode_sensitivity(data, "table")) == data


@settings(max_examples=30)
@given(_TABLE)
def test_one_line_per_unit_and_probe(table: SensitivityTable) -> None:
    lines = encode_sensitivity(table).decode().split("\n")
    entries = [line for line in lines if line.startswith("  ")]
    assert len(entries) == len(table.units) + len(table.probes)
    assert all(msgspec.json.decode(line.removesuffix(",").encode()) for line in entries)
