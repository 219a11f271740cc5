"""Block-by-block differentiation follows the wiring of every family of mlx-lm."""

import mlx.core as mx
import numpy as np
import pytest
from support_families import FAMILIES, tiny_family
from support_family_configs import COMMON
from support_gradients import gradients_by_block, gradients_of_whole_model
from support_other_families import NEEDS_METAL


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NEEDS_METAL])
def test_gradients_by_block_are_those_of_the_whole_model(name: str) -> None:
    model, _ = tiny_family(name)
    model.set_dtype(mx.float32)
    model.train()
    tokens = mx.random.randint(0, 256, (2, 40), key=mx.random.key(1))
    cotangent = mx.random.normal((2, 40, COMMON["vocab_size"]), key=mx.random.key(2))
    expected = gradients_of_whole_model(model, tokens, cotangent)
    found = gradients_by_block(model, tokens, cotangent)
    heads = expected.keys() - found.keys()
    assert len(heads) <= 1, heads
    for path in found:
        size = np.linalg.norm(expected[path])
        # float32 sums in another order; a wrong wiring is off by a tenth or more
        assert np.linalg.norm(found[path] - expected[path]) <= 1e-4 * size, path
