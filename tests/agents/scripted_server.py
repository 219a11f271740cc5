"""``optiq serve`` with one thing changed: what the model says is read from a script.

The prompt is really rendered and prefilled, caches and prefixes are real, and so is every step of decoding;
only the logits are replaced by ones under which the script's next token is certain. Run as a program::

    python scripted_server.py RULES.json [options of optiq serve]

The first rule whose words all occur in the prompt tells the answer; its tokens come ``pause_s`` apart.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

import mlx_optiq_ext.engine.batch as batch
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.engine.guard import Processor
from mlx_optiq_ext.engine.sampling import make_processors
from mlx_optiq_ext.models.load import load_tokenizer
from mlx_optiq_ext.types.model import ModelRef

__all__ = ["Rule", "force_scripts", "scripted"]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What to say where a prompt has all these words."""

    when: tuple[str, ...] = ()
    say: str
    pause_s: float = 0.0


def scripted(rules: Sequence[Rule], tokenizer: Any, num_prompt_tokens: int) -> Processor:
    """A processor of logits under which one row's answer is the script's.

    Args:
        rules: The last one should fit every prompt.
        tokenizer: Of the model.
        num_prompt_tokens: Where the answer begins.
    """
    answer: list[int] = []
    pause_s = 0.0

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal pause_s
        if not answer:
            prompt = tokenizer.decode(tokens.tolist())
            rule = next(rule for rule in rules if all(words in prompt for words in rule.when))
            answer.extend(tokenizer.encode(rule.say, add_special_tokens=False))
            pause_s = rule.pause_s
        time.sleep(pause_s)
        said = tokens.shape[0] - num_prompt_tokens
        token = answer[said] if said < len(answer) else tokenizer.eos_token_id
        return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -mx.inf)[None]

    return process


def force_scripts(rules: Sequence[Rule], tokenizer: Any) -> None:
    """Let the rows of every engine in this process say what the rules tell."""

    def make(sampling: Any, num_prompt_tokens: int, vocab_size: int) -> list[Processor]:
        stock = make_processors(sampling, num_prompt_tokens, vocab_size)
        return [*stock, scripted(rules, tokenizer, num_prompt_tokens)]

    batch.make_processors = make  # type: ignore[assignment]


if __name__ == "__main__":
    file, *words = sys.argv[1:]
    folder = words[words.index("--model") + 1]
    force_scripts(
        msgspec.json.decode(Path(file).read_bytes(), type=list[Rule]),
        load_tokenizer(ModelRef(path=folder, source=folder)),
    )
    sys.exit(main(["serve", *words]))
