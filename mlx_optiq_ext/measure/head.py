"""What an error in the output head costs, measured on the logits themselves.

The head's error acts on the logits with nothing behind it but a soft cap, so no estimate is needed: its
effect is added to the recorded head output and the divergence is taken exactly, on a sample of positions.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.measure.moments import windows_of
from mlx_optiq_ext.models.tape import Tape

__all__ = ["HeadStatistics"]

_SAMPLE_FLOATS = 24_000_000
"""Logits held per choice: positions are sampled so that positions × vocabulary stays below."""


class HeadStatistics:
    """Inputs of the head over all windows, and the divergence of errors in it.

    Args:
        tape: Recorded forward pass.
    Evaluates.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        num_positions = int(tape.tokens.shape[1])
        self._inputs: list[mx.array] = []
        self._sampled: list[mx.array] = []
        self._outputs: list[mx.array] = []
        stride = 1
        for window in range(tape.num_windows):
            kept: list[mx.array] = []

            def note(h: mx.array, head: object, kept: list[mx.array] = kept) -> mx.array:
                kept.append(h)
                return head(h[:, :1])  # type: ignore[operator,no-any-return]

            logits = tape.logits(window, head=note)
            h = kept[-1].reshape(-1, kept[-1].shape[-1]).astype(mx.float32)
            if window == 0:
                self.vocab = int(logits.shape[-1])
                wanted = max(4 * tape.num_windows, _SAMPLE_FLOATS // self.vocab)
                stride = max(1, num_positions * tape.num_windows // wanted)
            self._inputs.append(h)
            self._sampled.append(h[stride // 2 :: stride])
            mx.eval(self._inputs[-1], self._sampled[-1])
        self._stride = stride

    def importance(self) -> mx.array:
        """E[h_j²] (D,)."""
        return mx.mean(mx.square(mx.concatenate(self._inputs)), axis=0)

    def gram(
        self,
        experts: Sequence[int] | None = None,  # noqa: ARG002
        *,
        half: int | None = None,
    ) -> mx.array:
        """E[h hᵀ] (D, D); see :meth:`~mlx_optiq_ext.measure.statistics.UnitStatistics.gram`."""
        h = mx.concatenate([self._inputs[w] for w in windows_of(len(self._inputs), half)])
        return (h.T @ h) / h.shape[0]

    def logit_change(self, error: mx.array) -> list[mx.array]:
        """What an error (n, D) in some rows of the head adds to its output: one (positions, n) per window."""
        changes = [h @ error.T for h in self._sampled]
        mx.eval(changes)
        return changes

    def divergence(self, changes: list[list[mx.array]]) -> npt.NDArray[np.float64]:
        """Mean KL (C, W) of the changed head outputs, in nats per token.

        Args:
            changes: Per choice, per window: (positions, V) added to the head's output.
        """
        result = np.zeros((len(changes), self._tape.num_windows))
        for window in range(self._tape.num_windows):
            if len(self._outputs) <= window:
                self._outputs.append(self._raw_output(window))
            raw = self._outputs[window]
            reference = self._finish(window, raw)
            for c, change in enumerate(changes):
                other = self._finish(window, raw + change[window][None])
                result[c, window] = float(mx.mean(kl_divergence(reference, other)))
        return result

    def _raw_output(self, window: int) -> mx.array:
        """Output of the head itself at the sampled positions, before any soft cap: (1, positions, V)."""
        kept: list[mx.array] = []

        def sample(h: mx.array, head: object) -> mx.array:
            kept.append(head(h[:, self._stride // 2 :: self._stride]))  # type: ignore[operator]
            return kept[-1]

        self._tape.logits(window, head=sample)
        mx.eval(kept[-1])
        return kept[-1].astype(mx.float32)

    def _finish(self, window: int, raw: mx.array) -> mx.array:
        """Apply what a family does after its head (soft cap, scale) to a head output."""
        return self._tape.logits(window, head=lambda _h, _head: raw)
