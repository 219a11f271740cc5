"""Every block decoder gives the bits of the reference implementation, on random bytes."""

import gguf
import numpy as np
import pytest

from mlx_optiq_ext.models.gguf_blocks import BLOCK_TYPES

REFERENCE = {type_id: gguf.GGMLQuantizationType(type_id) for type_id in BLOCK_TYPES}


@pytest.mark.parametrize("type_id", BLOCK_TYPES, ids=[t.name for t in BLOCK_TYPES.values()])
def test_decoder_matches_the_reference_bit_for_bit(type_id):
    block_type, reference = BLOCK_TYPES[type_id], REFERENCE[type_id]
    rng = np.random.default_rng(type_id)
    blocks = rng.integers(0, 256, (97, block_type.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinities
        ours = block_type.decode(blocks)
        theirs = gguf.quants.dequantize(blocks, reference).reshape(ours.shape)
    assert ours.dtype == np.float32
    assert ours.shape == (97, block_type.numel)
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("type_id", BLOCK_TYPES, ids=[t.name for t in BLOCK_TYPES.values()])
def test_sizes_are_those_of_the_format(type_id):
    block_type, reference = BLOCK_TYPES[type_id], REFERENCE[type_id]
    assert block_type.name == reference.name
    assert (block_type.numel, block_type.nbytes) == gguf.GGML_QUANT_SIZES[reference]
