"""kv_config.json and kv_sensitivity.json: round trips, published forms, refusals that name the field."""

import hashlib
import json

import pytest

from mlx_optiq_ext.errors import FingerprintMismatch, MeasurementError, UsageError
from mlx_optiq_ext.formats.kv_config import (
    decode_kv_config,
    encode_kv_config,
    kv_config_from,
    read_kv_config,
    write_kv_config,
)
from mlx_optiq_ext.formats.kv_sensitivity import (
    decode_kv_sensitivity,
    encode_kv_sensitivity,
    kv_sensitivity_sha256,
    read_kv_sensitivity,
    write_kv_sensitivity,
)
from mlx_optiq_ext.types.kv import KVConfig, KVLayer, KVProbe, KVScore, KVSensitivity, KVSite
from mlx_optiq_ext.types.quant import KEEP, Choice, ModelFingerprint

FOUR, EIGHT = Choice(bits=4, group_size=64), Choice(bits=8, group_size=32)
CONFIG = KVConfig(
    model=ModelFingerprint(model_type="llama", sha256="ab"),
    layers=(
        KVLayer(index=0, layer=0, k=EIGHT, v=FOUR, key_mean="AAA="),
        KVLayer(index=2, member=1, layer=5, k=KEEP, v=FOUR, values_rotated=True),
    ),
    recent=16,
    first=4,
    bits_per_number=6.25,
    bytes_per_token=100.5,
    context=4096,
    predicted_divergence=1e-3,
    sensitivity_sha256="cd",
    notes=("one",),
    code_version="0.1.0",
)
SENSITIVITY = KVSensitivity(
    lengths=(256, 1024),
    sites=(KVSite(index=0, heads=2, key_dim=64, value_dim=64, window=512, first_kept=4),),
    rotate=True,
    probes=(
        KVProbe(index=0, tensor="k", choice=FOUR, divergence=0.25, stderr=0.01, by_length=(0.2, 0.3)),
        KVProbe(index=0, tensor="v", choice=EIGHT, divergence=0.5, exact=True),
    ),
    key_means=("AAA=",),
    scores=(KVScore(label="4g64", bits_per_number=4.5, divergence=0.1),),
    refused=(("3", "latents"),),
)
PUBLISHED = [
    {"layer_idx": 3, "bits": 4, "group_size": 64},
    {"layer_idx": 7, "bits": 8, "group_size": 32},
    {"layer_idx": 11, "bits": 16},
]
PUBLISHED_SENSITIVITY = [
    {
        "layer_idx": 3,
        "layer_name": "model.layers.3.self_attn",
        "sensitivities": {"8": 0.25, "4": 1.0, "3": None},
        "n_kv_heads": 2,
        "head_dim": 96,
    }
]


def test_a_configuration_round_trips(tmp_path):
    write_kv_config(tmp_path / "kv_config.json", CONFIG)
    assert read_kv_config(tmp_path / "kv_config.json") == CONFIG
    assert read_kv_config(tmp_path) == CONFIG  # the folder will do
    assert json.loads((tmp_path / "kv_config.json").read_bytes())["format_version"] == 1
    assert (tmp_path / "kv_config.json").read_bytes() == encode_kv_config(CONFIG)


def test_a_configuration_below_optiq_is_found(tmp_path):
    write_kv_config(tmp_path / "optiq" / "kv_config.json", CONFIG)
    assert read_kv_config(tmp_path) == CONFIG


def test_the_published_list_stores_keys_and_values_alike():
    config = decode_kv_config(json.dumps(PUBLISHED).encode())
    assert config.rotate is False
    assert [(entry.index, entry.layer, entry.k) for entry in config.layers] == [
        (-1, 3, FOUR),
        (-1, 7, EIGHT),
        (-1, 11, KEEP),
    ]
    assert all(entry.k == entry.v for entry in config.layers)
    assert decode_kv_config(encode_kv_config(config)) == config


def changed(**fields):
    return json.loads(encode_kv_config(CONFIG)) | fields


LAYER = {"index": 0, "k": {"bits": 4, "group_size": 64}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(format_version=2), "f.json has format version 2, this package reads up to 1"),
        ({"layers": []}, "f.json is not a KV configuration: it has no format_version"),
        (changed(recent=-1), "f.json: recent is -1"),
        (changed(surprise=1), "unknown field `surprise`"),
        (changed(layers=[{"index": "0"}]), r"`\$.layers\[0\].index`"),
        (
            changed(layers=[LAYER, LAYER | {"index": 1, "v": {"bits": 7, "group_size": 64}}]),
            r"f.json: layers\[1\].v: 7g64 is not a storage",
        ),
        (
            changed(layers=[LAYER | {"k": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}]),
            r"layers\[0\].k: mxfp4 is not a storage of a KV cache",
        ),
        (changed(layers=[LAYER, LAYER]), "f.json has two entries for index 0; leave one"),
        (changed(layers=[{"index": -1}]), r"layers\[0\] has neither index nor layer"),
        ([], "f.json lists no layers"),
        ([{"layer_idx": 0}], "missing required field `bits`"),
        ([{"layer_idx": 4, "bits": 9}], r"f.json: entry 0 \(layer_idx 4\): 9g64 is not a storage"),
        ([PUBLISHED[0], PUBLISHED[0]], "two entries for layer 3"),
        ([{"layer_idx": -2, "bits": 4}], "entry 0 has layer_idx -2"),
    ],
)
def test_a_broken_configuration_is_refused_by_file_and_field(document, message):
    with pytest.raises(UsageError, match=message):
        kv_config_from(document, "f.json")


def test_files_that_are_missing_or_no_json_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read KV configuration .*nowhere.json: No such file"):
        read_kv_config(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=r"has no KV configuration \(kv_config.json, optiq/kv_config.json\)"):
        read_kv_config(tmp_path)
    with pytest.raises(UsageError, match="is not JSON"):
        decode_kv_config(b"{")
    with pytest.raises(UsageError, match="is not JSON"):
        decode_kv_sensitivity(b"\xff")


def test_measurements_round_trip(tmp_path):
    path = tmp_path / "kv_sensitivity.json"
    write_kv_sensitivity(path, SENSITIVITY)
    assert read_kv_sensitivity(path) == read_kv_sensitivity(tmp_path) == SENSITIVITY
    assert encode_kv_sensitivity(read_kv_sensitivity(path)) == path.read_bytes()
    assert kv_sensitivity_sha256(SENSITIVITY) == hashlib.sha256(path.read_bytes()).hexdigest()
    # One probe a line.
    assert sum(line.lstrip().startswith('{"index":0,') for line in path.read_text().splitlines()) == 3


def test_measurements_that_are_not_finite_are_not_written():
    probe = KVProbe(index=4, tensor="v", choice=FOUR, divergence=float("nan"))
    with pytest.raises(MeasurementError, match="the values of cache 4 as 4g64"):
        encode_kv_sensitivity(KVSensitivity(lengths=(), sites=(), rotate=True, probes=(probe,)))


def test_published_measurements_are_shared_by_keys_and_values():
    data = json.dumps(PUBLISHED_SENSITIVITY).replace("null", "NaN").encode()
    table = decode_kv_sensitivity(data, "f.json")
    (site,) = table.sites
    assert (site.index, site.layer, site.heads, site.key_dim, site.value_dim) == (3, 3, 2, 96, 96)
    four, eight = Choice(bits=4, group_size=32), Choice(bits=8, group_size=32)  # 64 does not divide 96
    assert [(p.tensor, p.choice, p.divergence) for p in table.probes] == [
        ("k", four, 0.5),
        ("k", eight, 0.125),
        ("v", four, 0.5),
        ("v", eight, 0.125),
    ]
    assert "half of each divergence" in table.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 80}, "layer_idx 3 has head_dim 80, which no group divides"),
        ({"sensitivities": {"7": 1.0}}, "layer_idx 3, sensitivities: '7' is not a choice"),
        ({"sensitivities": {"4": None}}, "layer_idx 3 has no finite measurement"),
        ({"n_kv_heads": "two"}, r"n_kv_heads"),
    ],
)
def test_broken_published_measurements_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        decode_kv_sensitivity(json.dumps([PUBLISHED_SENSITIVITY[0] | fields]).encode(), "f.json")


def found(*sites):
    from mlx_optiq_ext.kv.observe import CacheMap

    return CacheMap(sites=sites, refused=())


def hybrid_site(index, layer, member=None):
    return KVSite(index=index, member=member, layer=layer, heads=2, key_dim=64, value_dim=64)


def test_entries_without_index_mean_the_cache_that_their_block_fills():
    from mlx_optiq_ext.kv.build import layouts

    caches = found(hybrid_site(0, 3), hybrid_site(1, 7), hybrid_site(2, 11))
    stored = layouts(caches, kv_config_from(PUBLISHED))
    assert {place: layout.key.choice for place, layout in stored.items()} == {
        (0, None): FOUR,
        (1, None): EIGHT,
        (2, None): KEEP,
    }
    assert stored[0, None].value.choice == FOUR
    assert not stored[0, None].key.rotate


def test_entries_for_blocks_without_a_cache_of_their_own_are_refused():
    from mlx_optiq_ext.kv.build import layouts

    with pytest.raises(FingerprintMismatch, match="names caches of block 7, of block 11, where this model"):
        layouts(found(hybrid_site(0, 3)), kv_config_from(PUBLISHED))
    both = found(hybrid_site(0, 3, 0), hybrid_site(0, 3, 1))
    with pytest.raises(FingerprintMismatch, match="one entry for block 3, which fills 2 caches"):
        layouts(both, kv_config_from(PUBLISHED[:1]))
