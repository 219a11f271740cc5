"""A data set as tokens: read, rendered, cut, with notes of all that was done to it.

Knows no model but its tokenizer. Called by ``train``.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from mlx_optiq_ext.formats.examples import Example, Preference
from mlx_optiq_ext.lora.batches import fit_length
from mlx_optiq_ext.lora.dataset import load_dataset
from mlx_optiq_ext.lora.masks import Pair, Sample, pair_of, samples_of
from mlx_optiq_ext.models.load import load_tokenizer
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.training import TrainOptions

__all__ = ["TokenData", "tokenize_dataset"]


class TokenData(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of a data set: samples, or pairs, which DPO judges later."""

    train: list[Any]
    valid: list[Any]
    test: list[Any]
    sha256: str
    notes: tuple[str, ...]
    """What was split off, cut and left out."""


def tokenize_dataset(
    source: str,
    base: ModelRef,
    options: TrainOptions,
    progress: ProgressSink,
    *,
    trust_remote_code: bool = False,
) -> TokenData:
    """Read, check, tokenize and cut a data set.

    Args:
        source: See :func:`~mlx_optiq_ext.lora.dataset.load_dataset`.
        base: Whose tokenizer and chat template are used.
        options: Method, lengths, split.
        progress: Told about every example.
        trust_remote_code: Let the tokenizer's own code run.
    Raises:
        UsageError: Unusable rows, or conversations that the template does not take, with file and line.
        UnsupportedModel: There is no usable tokenizer.
    """
    dataset = load_dataset(
        source,
        options.method,
        validation_share=options.validation_share,
        seed=options.seed,
        progress=progress,
    )
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    notes = list(dataset.notes)
    parts: dict[str, list[Any]] = {}
    for name in ("train", "valid", "test"):
        examples: tuple[Example, ...] = getattr(dataset, name)
        found = _tokenized(tokenizer, examples, options, name, progress)
        if found:
            found, cuts = fit_length(found, options.max_length)
            notes += [f"{name}: {cut}" for cut in cuts]
        parts[name] = found
    return TokenData(**parts, sha256=dataset.sha256, notes=tuple(notes))


def _tokenized(
    tokenizer: Any, examples: Sequence[Example], options: TrainOptions, name: str, progress: ProgressSink
) -> list[Any]:
    found: list[Sample | Pair] = []
    for index, example in enumerate(examples, 1):
        if isinstance(example, Preference):
            found.append(pair_of(tokenizer, example))
        else:
            found += samples_of(tokenizer, example, options.train_on)
        progress(Progress(stage="tokenize", done=index, total=len(examples), detail=name))
    return found
