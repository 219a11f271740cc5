"""Compare checkpoints with their reference on held-out text, at the bits they really store.

Called by ``optiq score``, by the conversion for its closing table, and by benchmarks.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import FingerprintMismatch, UsageError
from mlx_optiq_ext.eval.logits import LogitCache, window_logits
from mlx_optiq_ext.eval.prepare import load_uniform
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.hub.fingerprint import weights_origin
from mlx_optiq_ext.measure.calibration import Windows, load_windows
from mlx_optiq_ext.measure.divergence import kl_divergence, negative_log_likelihood, top1_agreement
from mlx_optiq_ext.measure.intervals import by_domain, estimate_mean, paired_ratio
from mlx_optiq_ext.models.load import load_model, load_tokenizer
from mlx_optiq_ext.models.walk import total_numel
from mlx_optiq_ext.quant.exact import make_exact, parameter_nbytes
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ScoreOptions
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import Choice
from mlx_optiq_ext.types.score import ScoreReport, ScoreRole, ScoreRow

__all__ = ["HeldOutScorer", "model_name", "parse_uniform", "require_same_tokens", "score"]

_SAMPLE = "Naïve 123 tokens — if (x > 0) { return y; }\n\tΣ 你好"


def score(
    reference: ModelRef,
    candidates: Sequence[ModelRef],
    options: ScoreOptions,
    progress: ProgressSink = ignore_progress,
    *,
    labels: Sequence[str] = (),
) -> ScoreReport:
    """Score checkpoints and uniform quantizations of the reference.

    Args:
        reference: The unquantized model.
        candidates: Any checkpoints of it that mlx-lm loads.
        options: Text, and uniform choices to compare with.
        progress: Gets one event per window and model.
        labels: Names of the candidates in the table; repository id or folder name where left out.
    Returns:
        The reference, then candidates, then uniform ones.
    Raises:
        UsageError: Nothing to score, or an unreadable choice.
        FingerprintMismatch: A candidate has another tokenizer or vocabulary.
        ResourceError: A model does not fit into memory.
    Cost: one forward per model over the text; one model in memory at a time.
    """
    uniform = parse_uniform(options.uniform)
    if not candidates and not uniform:
        raise UsageError("nothing to score: name a checkpoint or give --uniform 4,5,6")
    names = [*labels, *(model_name(candidate) for candidate in candidates[len(labels) :])]
    scorer = HeldOutScorer(reference, options, progress, num_models=len(candidates) + len(uniform))
    for candidate in candidates:
        require_same_tokens(
            scorer.tokenizer, reference, candidate, trust_remote_code=options.trust_remote_code
        )
    with scorer:
        for candidate, label in zip(candidates, names, strict=True):
            scorer.add_folder(candidate, label)
        for choice in uniform:
            scorer.add_uniform(choice)
        return scorer.report()


def parse_uniform(text: str) -> tuple[Choice, ...]:
    """Choices of ``--uniform``: ``4,5,6g32``.

    Raises:
        UsageError: A word is no choice.
    """
    return tuple(Choice.parse(word) for word in text.split(",") if word.strip())


def model_name(ref: ModelRef) -> str:
    """What people call a model: its repository id, or the name of its folder."""
    return Path(ref.path).name if ref.is_local else ref.source


def require_same_tokens(
    tokenizer: TokenizerWrapper, reference: ModelRef, candidate: ModelRef, *, trust_remote_code: bool
) -> None:
    """Refuse a checkpoint whose tokens mean something else than the reference's; reads no weights.

    Args:
        tokenizer: Of the reference.
        reference, candidate: The models.
        trust_remote_code: Run code of the candidate's tokenizer.
    Raises:
        FingerprintMismatch: Vocabulary or token ids differ.
    """
    other = load_tokenizer(candidate, trust_remote_code=trust_remote_code)
    same = other.get_vocab() == tokenizer.get_vocab()
    if not same or other.encode(_SAMPLE) != tokenizer.encode(_SAMPLE):
        raise FingerprintMismatch(
            f"{candidate.source} has another tokenizer than {reference.source}: "
            "divergence is defined only between models over the same tokens"
        )


class _WindowNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one model, means over its positions."""

    divergence: float
    top1: float
    nll: float


class HeldOutScorer:
    """Scores models one after the other against one reference; a context manager.

    Reads the text when made, runs the reference when entered. Belongs to the thread that made it.

    Args:
        reference: The unquantized model.
        options: Text to score on.
        progress: Gets one event per window.
        num_models: How many will be added, for progress.
    """

    def __init__(
        self,
        reference: ModelRef,
        options: ScoreOptions,
        progress: ProgressSink = ignore_progress,
        *,
        num_models: int = 1,
    ) -> None:
        self.reference = reference
        self._options = options
        self._progress = progress
        self.tokenizer = load_tokenizer(reference, trust_remote_code=options.trust_remote_code)
        self.windows: Windows = load_windows(
            self.tokenizer,
            source=options.held_out,
            split="held_out",
            num_tokens=options.num_tokens,
            window=options.window,
        )
        self._done, self._total = 0, len(self.windows.tokens) * (num_models + 1)
        self._rows: list[ScoreRow] = []
        self._first: list[float] | None = None
        self._closing = ExitStack()
        self._cache = self._closing.enter_context(LogitCache(len(self.windows.tokens)))

    def __enter__(self) -> "HeldOutScorer":
        try:
            self._run_reference()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def add_folder(self, candidate: ModelRef, label: str = "") -> ScoreRow:
        """Score a checkpoint, at the bytes of its weight files."""
        nbytes = sum(tensor.nbytes for tensor in read_folder(Path(candidate.path)).values())
        model, _ = load_model(candidate, trust_remote_code=self._options.trust_remote_code)
        return self.add_model(model, label or model_name(candidate), nbytes=nbytes)

    def add_uniform(self, choice: Choice) -> ScoreRow:
        """Score the reference quantized with one choice, as stock mlx-lm would."""
        model, _ = load_uniform(self.reference, choice, trust_remote_code=self._options.trust_remote_code)
        label = f"uniform {choice.label}"
        return self.add_model(model, label, nbytes=parameter_nbytes(model), role="uniform")

    def add_model(
        self, model: nn.Module, label: str, *, nbytes: int, role: ScoreRole = "candidate"
    ) -> ScoreRow:
        """Score a model in memory, which is changed: on the CPU it becomes dense float32.

        Args:
            model: Weights may be lazy.
            label: Name in the table.
            nbytes: What it takes on disk.
            role: Candidates and uniform ones are told apart by readers.
        Raises:
            FingerprintMismatch: Another number of logits.
            MeasurementError: Logits that are not finite.
        """
        make_exact(model, label)
        numbers = []
        tokens = self.windows.tokens
        for window, rows in window_logits(model, tokens, self._cache.vocab_size):
            numbers.append(_compare(self._cache.get(window), rows, tokens[window]))
            self._step(label)
        del model
        mx.clear_cache()
        row = self._row(numbers, label, role, nbytes)
        self._rows.append(row)
        return row

    def report(self) -> ScoreReport:
        """Everything scored so far: reference, candidates, uniform ones."""
        origin = weights_origin(Path(self.reference.path))
        order = {"reference": 0, "candidate": 1, "uniform": 2}
        return ScoreReport(
            reference=model_name(self.reference),
            held_out=self.windows.info,
            window=int(self.windows.tokens.shape[1]),
            rows=tuple(sorted(self._rows, key=lambda row: order[row.role])),
            notes=(
                *(f"held-out text: {note}" for note in self.windows.info.notes),
                *((f"reference {origin}",) if origin else ()),
            ),
            code_version=__version__,
        )

    def _run_reference(self) -> None:
        model, _ = load_model(self.reference, trust_remote_code=self._options.trust_remote_code)
        self._numel, nbytes = total_numel(model), parameter_nbytes(model)
        make_exact(model, self.reference.source)
        numbers = []
        for window, rows in window_logits(model, self.windows.tokens):
            self._cache.put(window, rows)
            numbers.append(_compare(rows, rows, self.windows.tokens[window]))
            self._step("reference")
        del model
        mx.clear_cache()
        self._rows.append(self._row(numbers, "reference", "reference", nbytes))

    def _step(self, label: str) -> None:
        self._done += 1
        total = max(self._total, self._done)
        self._progress(Progress(stage="score", done=self._done, total=total, detail=label))

    def _row(self, numbers: Sequence[_WindowNumbers], label: str, role: ScoreRole, nbytes: int) -> ScoreRow:
        info, domains = self.windows.info, self.windows.domain_index
        divergences = [window.divergence for window in numbers]
        divergence = estimate_mean(divergences, domains)
        top1 = estimate_mean([window.top1 for window in numbers], domains)
        nll = estimate_mean([window.nll for window in numbers], domains)
        means = by_domain(divergences, domains, len(info.domains))
        row = ScoreRow(
            label=label,
            role=role,
            bpw=8 * nbytes / self._numel,
            nbytes=nbytes,
            divergence=divergence.mean,
            divergence_stderr=divergence.stderr,
            divergence_half_width=divergence.half_width,
            top1=top1.mean,
            top1_stderr=top1.stderr,
            top1_half_width=top1.half_width,
            perplexity=math.exp(nll.mean),
            perplexity_stderr=math.exp(nll.mean) * nll.stderr,
            perplexity_half_width=math.exp(nll.mean) * nll.half_width,
            by_domain={name: mean for name, mean in zip(info.domains, means, strict=True) if mean == mean},
        )
        return self._against_first(row, divergences)

    def _against_first(self, row: ScoreRow, divergences: list[float]) -> ScoreRow:
        """Add the paired ratio to the first candidate; that one becomes the base."""
        if row.role == "reference":
            return row
        if self._first is None:
            self._first = divergences if row.role == "candidate" else None
            return row
        if not any(self._first):
            return row
        paired = paired_ratio(divergences, self._first, self.windows.domain_index)
        interval = (max(paired.low, 0.0), paired.high)
        return replace(row, against_first=paired.mean, against_first_interval=interval)


def _compare(reference: mx.array, logits: mx.array, tokens: npt.NDArray[np.int32]) -> _WindowNumbers:
    """Compare one window's logits, (T, V), with the reference's."""
    following = negative_log_likelihood(logits[None], mx.array(tokens)[None])
    return _WindowNumbers(
        divergence=float(np.asarray(kl_divergence(reference, logits)).mean(dtype=np.float64)),
        top1=float(np.asarray(top1_agreement(reference, logits)).mean()),
        nll=float(np.asarray(following).mean(dtype=np.float64)),
    )
