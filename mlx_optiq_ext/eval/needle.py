"""Facts hidden in a long context: does the model still find them when its KV cache is stored in fewer bits?

The answer is teacher-forced, so one forward tells of every answer token whether it ranks first. Called by
``eval.kv_compare``.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from mlx_optiq_ext.eval.kv_score import NamedConfig, block_of, logits_behind
from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.types.kv import NeedleCell
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["DEPTHS", "FULL", "Haystack", "check_needles", "needle_notes"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where facts stand: 0 is the beginning, 1 the end of the context."""
FULL = "full precision"
"""Name of the cache that everything is compared with."""

_NAMES = ("Aldbourne", "Brackley", "Corsham", "Dulverton", "Eyemouth", "Frodsham", "Garstang", "Helmsley")
_USEFUL = 0.5
"""Share of the facts that a model has to find for a comparison of its caches to mean anything."""


class Haystack(NamedTuple):
    """In what the facts of one model are hidden."""

    model: str
    tokenizer: Any
    windows: Mapping[int, NDArray[np.int32]]
    """Held-out text by length."""
    seed: int


class _Needle(NamedTuple):
    """A context with its fact, the question behind it, and the answer."""

    tokens: NDArray[np.int32]
    question: int
    """Position of the question's first token."""
    answer: int
    """Position of the answer's first token."""


def check_needles(
    model: nn.Module,
    haystack: Haystack,
    configs: Sequence[NamedConfig],
    progress: ProgressSink = ignore_progress,
) -> tuple[NeedleCell, ...]:
    """Hide one fact at every depth of a context of every length and look whether each cache finds it.

    Args:
        model: In the form it runs in.
        haystack: Text and seed; equal seeds hide equal facts at equal places.
        configs: Stored caches.
        progress: Stage ``needle``, one event per context.
    Returns:
        One cell per configuration, length and depth. Lengths too short for the fact are left out.
    Cost: per cell one forward, and one more per length and depth for the full-precision cache.
    """
    found = []
    block = block_of([named.config for named in configs])
    total, done = len(haystack.windows) * len(DEPTHS), 0
    for length, windows in haystack.windows.items():
        for number, depth in enumerate(DEPTHS):
            done += 1
            detail = f"{length} tokens, depth {depth:.0%}"
            progress(Progress(stage="needle", done=done, total=total, detail=detail))
            rng = random.Random(f"{haystack.seed} {length} {depth}")
            needle = _hidden(haystack.tokenizer, windows[number % len(windows)], depth, rng)
            if needle is None:
                continue
            full = _answer(model, make_prompt_cache(model), needle, block)
            for named in configs:
                share, log_probability = _answer(model, build_caches(model, named.config), needle, block)
                found.append(
                    NeedleCell(
                        model=haystack.model,
                        cache=named.label,
                        length=length,
                        depth=depth,
                        full_found=full[0],
                        found=share,
                        log_probability_change=log_probability - full[1],
                    )
                )
            mx.clear_cache()
    return tuple(found)


def needle_notes(cells: Sequence[NeedleCell]) -> tuple[str, ...]:
    """What has to be said of models that do not find facts with the full-precision cache either."""
    notes = []
    for model in dict.fromkeys(cell.model for cell in cells):
        # Every cache of a model is compared on the same facts.
        full = {(cell.length, cell.depth): cell.full_found for cell in cells if cell.model == model}
        found = sum(share == 1.0 for share in full.values())
        if found < _USEFUL * len(full):
            notes.append(
                f"{model} itself finds {found} of {len(full)} hidden facts, with its full-precision cache: "
                "it cannot find needles, and the comparison of its caches means nothing"
            )
    return tuple(notes)


def _hidden(tokenizer: Any, text: NDArray[np.int32], depth: float, rng: random.Random) -> _Needle | None:
    """A fact in a context as long as ``text``; None where the context has no room for it."""
    name = rng.choice(_NAMES)
    answer = _tokens(tokenizer, f" {rng.randrange(10_000, 100_000)}")
    fact = [
        *_tokens(tokenizer, f"\n\nThe secret number of {name} is"), *answer, *_tokens(tokenizer, ".\n\n")
    ]  # fmt: skip
    question = _tokens(
        tokenizer,
        f"\n\nQuestion: What is the secret number of {name}?\nAnswer: The secret number of {name} is",
    )
    room = len(text) - len(fact) - len(question) - len(answer)
    if room < len(fact):
        return None
    before = round(room * depth)
    tokens = [*text[:before], *fact, *text[before:room], *question, *answer]
    first = len(tokens) - len(answer)
    return _Needle(np.array(tokens, dtype=np.int32), first - len(question), first)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _answer(model: nn.Module, caches: list[Any], needle: _Needle, block: int | None) -> tuple[float, float]:
    """Share of the answer's tokens ranked first, and the log probability of all of them."""
    logits, _ = logits_behind(model, caches, needle.tokens[:-1], needle.question, block)
    scores = logits[needle.answer - 1 - needle.question :]
    wanted = mx.array(needle.tokens[needle.answer :])
    picked = mx.take_along_axis(scores, wanted[:, None], axis=-1)[:, 0]
    log_probability = np.asarray(picked - mx.logsumexp(scores, axis=-1)).sum(dtype=np.float64)
    found = np.asarray(mx.argmax(scores, axis=-1) == wanted).mean()
    return float(found), float(log_probability)
