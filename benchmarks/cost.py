"""What measuring costs: in forward passes, and per tensor as a model gets deeper.

    python benchmarks/cost.py [--blocks 4,8,16,32]

Random Llama models of the same width and growing depth; one run, so compare rows, not machines.
"""

import argparse
import time

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402

from mlx_optiq_ext.measure.fisher import fisher_pass  # noqa: E402
from mlx_optiq_ext.models.tape import Tape  # noqa: E402
from mlx_optiq_ext.models.walk import quantizable_modules  # noqa: E402


def build(num_blocks: int) -> llama.Model:
    args = llama.ModelArgs(
        model_type="llama", hidden_size=512, num_hidden_layers=num_blocks, intermediate_size=1536,
        num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, vocab_size=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


def seconds(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default="4,8,16,32")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    print("blocks  weights  forward s  recorded s  Fisher s  Fisher / forward  s per tensor")
    for num_blocks in (int(n) for n in args.blocks.split(",")):
        model = build(num_blocks)
        tokens = mx.random.randint(0, 2048, (args.windows, 128), key=mx.random.key(0))
        mx.eval(model(tokens))
        forward = min(seconds(lambda: mx.eval(model(tokens))) for _ in range(2))  # noqa: B023
        tape = Tape(model, tokens)
        recorded = seconds(tape.forward)

        def measure(tape: Tape = tape) -> None:
            for block in fisher_pass(tape, samples=1, seed=0):
                mx.eval([statistics.importance() for statistics in block.units.values()])

        fisher = seconds(measure)
        numel = sum(a.size for _, a in tree_flatten(model.parameters()))
        units = len(quantizable_modules(model))
        print(
            f"{num_blocks:6d}  {numel / 1e6:5.1f} M  {forward:9.2f}  {recorded:10.2f}  {fisher:8.2f}"
            f"  {(recorded + fisher) / forward:16.2f}  {(recorded + fisher) / units:12.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
